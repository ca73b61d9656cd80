package coordinator

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"godwit/wire"
)

// writeJSON writes one document on one line.
func writeJSON(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write the output: %w", err)
	}
	if _, err := w.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("write the output: %w", err)
	}
	return nil
}

// errorDoc is a wire.Error for programs.
type errorDoc struct {
	Code     string       `json:"code"` // as in the protocol, lower case: "refused"
	Message  string       `json:"message"`
	Host     string       `json:"host,omitempty"`
	Phase    string       `json:"phase,omitempty"` // as State.Word
	Problems []problemDoc `json:"problems,omitempty"`
}

type problemDoc struct {
	PID    int32  `json:"pid,omitempty"`
	Comm   string `json:"comm,omitempty"`
	FD     *int32 `json:"fd,omitempty"`
	Path   string `json:"path,omitempty"`
	Key    string `json:"key,omitempty"`
	Reason string `json:"reason"`
	Hint   string `json:"hint,omitempty"`
}

func newErrorDoc(e *wire.Error) *errorDoc {
	if e == nil {
		return nil
	}
	d := &errorDoc{
		Code:    strings.ToLower(strings.TrimPrefix(e.Code.String(), "CODE_")),
		Message: e.Message, Host: e.Host, Phase: strings.ToLower(strings.ReplaceAll(e.Phase, "_", " ")),
	}
	for _, p := range e.Problems {
		o := p.GetObject()
		doc := problemDoc{PID: o.GetPid(), Comm: o.GetComm(), Path: o.GetPath(), Key: o.GetKey(), Reason: p.GetReason(), Hint: p.GetHint()}
		if o.GetHasFd() {
			fd := o.GetFd()
			doc.FD = &fd
		}
		d.Problems = append(d.Problems, doc)
	}
	return d
}

// stamp is a time in milliseconds since 1970 for programs; nil for 0.
func stamp(unixMS int64) *time.Time {
	if unixMS == 0 {
		return nil
	}
	t := time.UnixMilli(unixMS).UTC()
	return &t
}
