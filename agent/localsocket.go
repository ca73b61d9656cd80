package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// The agent's own socket is where commands on its host hand descriptors to it:
// a Unix socket of sequenced packets in the state directory, for its owner only.
// A packet is one JSON document; the first one, from the command, comes with
// the descriptor (SCM_RIGHTS).

const (
	localVersion  = 1
	localPacket   = 16 << 10 // bytes of the longest packet
	localPatience = 10 * time.Second
)

// localRequest is what a command asks of the agent.
type localRequest struct {
	Version  int    `json:"version"`
	Do       string `json:"do"`             // "provide"
	Selector string `json:"selector"`       // which object of a tree the descriptor is for
	What     string `json:"what,omitempty"` // where it comes from, for messages
}

// Events that the agent tells a provider of.
const (
	eventReady    = "ready"    // the agent keeps the descriptor
	eventRefused  = "refused"  // it does not; the connection ends
	eventHeld     = "held"     // a migration has taken it
	eventReleased = "released" // that migration was aborted; it is ready again
	eventUsed     = "used"     // the tree runs with it; the connection ends
)

// localEvent is what the agent tells a command.
type localEvent struct {
	Event     string `json:"event"`
	Text      string `json:"text,omitempty"` // one sentence for people
	Migration string `json:"migration,omitempty"`
}

// localSocketPath is where the agent of a host listens.
func localSocketPath(stateDir, host string) string {
	return filepath.Join(stateDir, "agent-"+host+".sock")
}

// shortAddress gives a name for the socket that fits into an address (unix(7):
// 108 bytes); done frees what it needs.
func shortAddress(path string) (name string, done func(), err error) {
	if len(path) < len(unix.RawSockaddrUnix{}.Path) {
		return path, func() {}, nil
	}
	dir, err := openFile(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return "", nil, err
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path)), func() { _ = dir.Close() }, nil
}

// listenLocal opens the agent's socket. Preconditions: the caller has the lock
// of the state directory, so that a socket that is there is of a dead agent.
func listenLocal(path string) (*net.UnixListener, error) {
	name, done, err := shortAddress(path)
	if err != nil {
		return nil, err
	}
	defer done()
	if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove the socket of an earlier agent: %w", err)
	}
	// The permissions of the socket before it is bound become those of its name.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) { err = os.NewSyscallError("fchmod", unix.Fchmod(int(fd), 0o600)) })
		return errors.Join(cerr, err)
	}}
	l, err := lc.Listen(forever(), "unixpacket", name)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	ul := l.(*net.UnixListener)
	ul.SetUnlinkOnClose(false) // the name may be one of /proc
	return ul, nil
}

// serveLocal answers commands of this host until l is closed.
func (a *Agent) serveLocal(l *net.UnixListener) {
	for {
		c, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			a.log.Warn("a command of this host cannot be answered", "error", err)
			time.Sleep(50 * time.Millisecond) // out of descriptors, most likely
			continue
		}
		go a.answerLocal(c)
	}
}

// answerLocal serves one connection to its end.
func (a *Agent) answerLocal(c *net.UnixConn) {
	defer func() { _ = c.Close() }()
	req, file, err := receiveLocal(c)
	if err == nil {
		err = a.provisions.serve(c, req, file)
	}
	if err != nil {
		a.log.Info("a command of this host was refused", "reason", err)
		_ = sendEvent(c, localEvent{Event: eventRefused, Text: err.Error()})
	}
}

// receiveLocal reads the request of a connection and the descriptor with it.
func receiveLocal(c *net.UnixConn) (req localRequest, file *os.File, err error) {
	if err := c.SetReadDeadline(time.Now().Add(localPatience)); err != nil {
		return req, nil, err
	}
	// Read first in any case: closing with a packet unread would lose the answer.
	body, files, err := readPacket(c)
	if err != nil {
		return req, nil, err
	}
	if err = samePerson(c); err == nil {
		req, err = parseLocalRequest(body)
	}
	if err == nil && len(files) != 1 {
		err = fmt.Errorf("%d descriptors came with the request, expected one", len(files))
	}
	if err == nil {
		err = c.SetReadDeadline(time.Time{})
	}
	if err != nil {
		closeAll(files)
		return req, nil, err
	}
	return req, files[0], nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// samePerson wants the other end to be of the user that the agent runs as.
func samePerson(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var serr error
	if err := raw.Control(func(fd uintptr) { cred, serr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if serr != nil {
		return os.NewSyscallError("getsockopt SO_PEERCRED", serr)
	}
	if int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("pid %d is of user %d, and only user %d may hand files to this agent", cred.Pid, cred.Uid, os.Geteuid())
	}
	return nil
}

// readPacket reads one packet and the descriptors with it.
func readPacket(c *net.UnixConn) ([]byte, []*os.File, error) {
	buf, oob := make([]byte, localPacket), make([]byte, unix.CmsgSpace(4*8))
	n, on, flags, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, nil, err
	}
	files, err := filesOf(oob[:on])
	switch {
	case err != nil:
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		err = errors.New("the packet is too long")
	case n == 0:
		err = errors.New("the other end has closed the connection")
	}
	if err != nil {
		closeAll(files)
		return nil, nil, err
	}
	return buf[:n], files, nil
}

// filesOf takes the descriptors out of control messages. What it gives is the
// caller's even if there is an error.
func filesOf(oob []byte) (files []*os.File, _ error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for i := range msgs {
		if msgs[i].Header.Level != unix.SOL_SOCKET || msgs[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			return files, err
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), fmt.Sprintf("handed descriptor %d", fd)))
		}
	}
	return files, nil
}

// parseLocalRequest reads the JSON of a request.
func parseLocalRequest(b []byte) (localRequest, error) {
	var r localRequest
	if !utf8.Valid(b) {
		return r, errors.New("the request is not text")
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return r, fmt.Errorf("the request cannot be read: %w", err)
	}
	switch {
	case r.Version != localVersion:
		return r, fmt.Errorf("the command speaks version %d of the agent's socket, the agent version %d; update the older one", r.Version, localVersion)
	case r.Do != "provide":
		return r, fmt.Errorf("the request %q is not known", r.Do)
	case r.Selector == "":
		return r, errors.New("the request does not say what the descriptor is for")
	case strings.ContainsFunc(r.Selector+r.What, func(c rune) bool { return c < ' ' || c == 0x7f }):
		return r, errors.New("the request holds control characters")
	}
	return r, nil
}

func sendEvent(c *net.UnixConn, e localEvent) error {
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	if err := c.SetWriteDeadline(time.Now().Add(localPatience)); err != nil {
		return err
	}
	_, err = c.Write(b)
	return err
}
