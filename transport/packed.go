package transport

import (
	"bytes"
	"compress/flate"
	"fmt"
	"io"
)

// encodingHeader says how the body of a call or of its reply is packed.
const encodingHeader = "Godwit-Encoding"

const (
	deflated = "deflate"
	// maxUnpacked bounds an unpacked body, in bytes.
	maxUnpacked = 64 << 20
	// headerRoom is left for headers in a message of the bus.
	headerRoom = 4 << 10
)

// pack makes a body fit into a message of the bus: the lists of what large trees
// have open do not, as they are. encoding is empty for a body that is as it was.
func pack(body []byte, limit int64) (packed []byte, encoding string) {
	if int64(len(body)) <= limit-headerRoom {
		return body, ""
	}
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, flate.DefaultCompression)
	if err != nil {
		return body, ""
	}
	if _, err := w.Write(body); err != nil || w.Close() != nil {
		return body, ""
	}
	return b.Bytes(), deflated
}

// unpack is what was packed. The body is untrusted.
func unpack(body []byte, encoding string) ([]byte, error) {
	switch encoding {
	case "":
		return body, nil
	case deflated:
		out, err := io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(body)), maxUnpacked+1))
		if err != nil {
			return nil, fmt.Errorf("unpack %d bytes: %w", len(body), err)
		}
		if len(out) > maxUnpacked {
			return nil, fmt.Errorf("%d bytes unpack to more than %d", len(body), maxUnpacked)
		}
		return out, nil
	}
	return nil, fmt.Errorf("the encoding %q is not known", encoding)
}
