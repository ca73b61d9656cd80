package configs

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

const second = Duration(time.Second)

// Bounds of values. Window: the server stalls producers of a connection above
// 48 MiB. Chunk: the default max_payload of a NATS server is 1 MiB, and a
// stream's frame needs some of it; 512 KiB is where larger ones gain little.
const (
	minWindow = 64 << 10
	maxWindow = 48 << 20
	minChunk  = 4 << 10
	maxChunk  = 1<<20 - 4<<10
	maxLanes  = 16

	maxMigrations = 1000
	minMemory     = 32 << 20
	minBandwidth  = 64 << 10
)

// A name on the bus is one token of a subject.
var hostName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,63}$`)

// busName makes a name on the bus out of any.
func busName(s string) string {
	b := []byte(s)
	for i, c := range b {
		if !hostName.Match([]byte{c}) {
			b[i] = '-'
		}
	}
	return string(b[:min(len(b), 63)])
}

func (c *Agent) validate(l *loader) {
	if c.Host != "" && !hostName.MatchString(c.Host) {
		l.bad("host", "%q cannot be a host's name on the bus; want letters, digits, - and _, at most 63", c.Host)
	}
	absolute(l, "state_dir", c.StateDir, true)
	if len(c.NATS.URLs) == 0 {
		l.bad("nats.urls", "is empty; want at least one URL, such as \"nats://127.0.0.1:4222\"")
	}
	validateNATS(l, c.NATS)

	c.Direct.validate(l)

	lim := c.Limits
	if lim.Window < minWindow || lim.Window > maxWindow {
		l.bad("limits.window", "%s; want from %s to %s", lim.Window, Size(minWindow), Size(maxWindow))
	}
	switch {
	case lim.Chunk < minChunk || lim.Chunk > maxChunk:
		l.bad("limits.chunk", "%s; want from %s to %s", lim.Chunk, Size(minChunk), Size(maxChunk))
	case lim.Chunk > lim.Window/2:
		l.bad("limits.chunk", "%s is more than half of limits.window (%s)", lim.Chunk, lim.Window)
	}
	for key, n := range map[string]int{"limits.outgoing": lim.Outgoing, "limits.incoming": lim.Incoming} {
		if n < 1 || n > maxMigrations {
			l.bad(key, "%d; want from 1 to %d", n, maxMigrations)
		}
	}
	if lim.Lanes < 1 || lim.Lanes > maxLanes {
		l.bad("limits.lanes", "%d; want from 1 to %d", lim.Lanes, maxLanes)
	}
	switch {
	case lim.MemoryLimit < minMemory:
		l.bad("limits.memory_limit", "%s; want at least %s", lim.MemoryLimit, Size(minMemory))
	case lim.MemoryLimit < 3*lim.Window:
		l.bad("limits.memory_limit", "%s; want at least three times limits.window (%s)", lim.MemoryLimit, lim.Window)
	}
	if lim.Bandwidth != 0 && lim.Bandwidth < minBandwidth {
		l.bad("limits.bandwidth", "%s; want at least %s, or 0 for no cap", lim.Bandwidth, Rate(minBandwidth))
	}

	for _, t := range []struct {
		key       string
		d         Duration
		low, high Duration
	}{
		{"timeouts.freeze", c.Timeouts.Freeze, second / 10, 600 * second},
		{"timeouts.frozen", c.Timeouts.Frozen, second, 24 * 3600 * second},
		{"timeouts.idle", c.Timeouts.Idle, second, 600 * second},
		{"timeouts.prepared", c.Timeouts.Prepared, second, 3600 * second},
	} {
		if t.d < t.low || t.d > t.high {
			l.bad(t.key, "%s; want from %s to %s", t.d, t.low, t.high)
		}
	}
	c.Log.validate(l)
	for i := range c.External {
		c.External[i].validate(l, fmt.Sprintf("external[%d]", i))
	}
}

func (c *Coordinator) validate(l *loader) {
	validateNATS(l, c.NATS)
	absolute(l, "serve.store_dir", c.Serve.StoreDir, true)
	host, port, err := net.SplitHostPort(c.Serve.Listen)
	if err != nil {
		l.bad("serve.listen", "%q is no address; want host:port, such as 127.0.0.1:4222", c.Serve.Listen)
	} else {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			l.bad("serve.listen", "port %q; want a number from 1 to 65535", port)
		}
		if strings.ContainsAny(host, " /") {
			l.bad("serve.listen", "host %q is no address or name", host)
		}
	}
	c.Log.validate(l)
}

func (c Direct) validate(l *loader) {
	if host, port, err := net.SplitHostPort(c.Listen); err != nil {
		l.bad("direct.listen", "%q is no address; want host:port, such as 0.0.0.0:4223", c.Listen)
	} else {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			l.bad("direct.listen", "port %q; want a number from 1 to 65535", port)
		}
		if _, err := netip.ParseAddr(host); err != nil {
			l.bad("direct.listen", "host %q is no IP address", host)
		}
	}
	for _, a := range c.Advertise {
		host := a
		if h, port, err := net.SplitHostPort(a); err == nil {
			host = h
			if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
				l.bad("direct.advertise", "%q: port %q; want a number from 1 to 65535", a, port)
			}
		}
		if _, err := netip.ParseAddr(host); err != nil && (host == "" || strings.ContainsAny(host, " /:@,")) {
			l.bad("direct.advertise", "%q is no address or name; want host or host:port", a)
		}
	}
}

func (c Log) validate(l *loader) {
	levels := []string{"trace", "debug", "info", "warn", "error"}
	if !slices.Contains(levels, c.Level) {
		l.bad("log.level", "%q; want one of %s%s", c.Level, strings.Join(levels, ", "), didYouMean(nearest(c.Level, levels)))
	}
	if formats := []string{"text", "json"}; !slices.Contains(formats, c.Format) {
		l.bad("log.format", "%q; want text or json", c.Format)
	}
}

func validateNATS(l *loader, n NATS) {
	for _, s := range n.URLs {
		u, err := url.Parse(s)
		switch {
		case err != nil:
			// url.Error repeats the text, which may hold a password.
			l.bad("nats.urls", "an element is no URL; want nats://host:port")
		case !slices.Contains([]string{"nats", "tls", "ws", "wss"}, u.Scheme) || u.Hostname() == "":
			l.bad("nats.urls", "%q; want nats://host:port, or the schemes tls, ws, wss", u.Redacted())
		case u.User != nil:
			l.bad("nats.urls", "%q holds credentials, which would show in messages; use nats.user and nats.password_file, or nats.nkey_file", u.Redacted())
		}
	}
	var ways []string
	for _, w := range []struct{ key, value string }{
		{"nats.nkey_file", n.NKeyFile}, {"nats.creds_file", n.CredsFile}, {"nats.user", n.User},
	} {
		if w.value != "" {
			ways = append(ways, w.key)
		}
	}
	if len(ways) > 1 {
		l.bad(ways[1], "is set beside %s; want one kind of credentials", ways[0])
	}
	switch {
	case n.User != "" && n.PasswordFile == "":
		l.bad("nats.user", "is set without nats.password_file")
	case n.User == "" && n.PasswordFile != "":
		l.bad("nats.password_file", "is set without nats.user")
	}
	switch {
	case n.TLS.Cert != "" && n.TLS.Key == "":
		l.bad("nats.tls.cert", "is set without nats.tls.key")
	case n.TLS.Cert == "" && n.TLS.Key != "":
		l.bad("nats.tls.key", "is set without nats.tls.cert")
	}
	for _, f := range []struct{ key, path string }{
		{"nats.nkey_file", n.NKeyFile}, {"nats.creds_file", n.CredsFile}, {"nats.password_file", n.PasswordFile},
		{"nats.tls.ca", n.TLS.CA}, {"nats.tls.cert", n.TLS.Cert}, {"nats.tls.key", n.TLS.Key},
	} {
		absolute(l, f.key, f.path, false)
	}
}

// absolute checks a path. A relative one would depend on where the daemon was
// started; from a flag it is what a person means, and the flag makes it
// absolute.
func absolute(l *loader, key, path string, needed bool) {
	switch {
	case path == "" && needed:
		l.bad(key, "is empty; want an absolute path")
	case path != "" && !filepath.IsAbs(path):
		l.bad(key, "%q; want an absolute path", path)
	}
}
