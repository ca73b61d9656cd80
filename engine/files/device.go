package files

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	"golang.org/x/sys/unix"
)

// kindDevice carries character devices without a state of their own in the open
// file, found by path.
var kindDevice = &kind{
	name: "character device", typ: fdinfo.FdTypes_REG,
	takes: func(_ *Dumper, o *object) bool {
		return o.mode()&unix.S_IFMT == unix.S_IFCHR && !o.isPath() && strings.HasPrefix(o.link, "/") && !isTTY(o)
	},
	dump:  dumpDevice,
	has:   func(_ *Restorer, x *description) bool { return isDeviceEntry(x) },
	check: checkRegular,
	open:  openEach(openDevice),
}

// isDeviceEntry says whether an entry is that of a device open for use.
func isDeviceEntry(x *description) bool {
	return x.entry.GetReg().GetMode()&unix.S_IFMT == unix.S_IFCHR && x.entry.GetReg().GetFlags()&unix.O_PATH == 0
}

// stateless are devices whose open files hold nothing: null, zero, full, random,
// urandom and the hardware's random numbers. Others may keep what no image holds.
var stateless = [][2]int{{1, 3}, {1, 5}, {1, 7}, {1, 8}, {1, 9}, {10, 183}}

// kernelLog is /dev/kmsg. Whoever only writes to it has no position in it.
var kernelLog = [2]int{1, 11}

// stateful names devices, by major and minor number (-1: all)
// (Documentation/admin-guide/devices.txt).
var stateful = []struct {
	major, minor int
	what         string
}{
	{1, 1, "physical memory"}, {1, 2, "kernel memory"}, {1, 4, "I/O ports"}, {1, 11, "the kernel's log"},
	{10, 229, "a FUSE connection"}, {10, 232, "virtual machines"},
	{10, 238, "a vhost device"}, {10, 241, "a vhost device"}, {10, 237, "loop devices"}, {10, 236, "device mapper"},
	{10, 130, "a watchdog"}, {10, 135, "a clock"}, {254, 0, "a clock"}, {10, 223, "an input device"}, {10, 196, "VFIO"}, {13, -1, "an input device"}, {21, -1, "a SCSI device"},
	{29, -1, "a frame buffer"}, {81, -1, "a video device"}, {89, -1, "an I2C bus"}, {108, -1, "a PPP interface"},
	{116, -1, "a sound device"}, {14, -1, "a sound device"}, {180, -1, "a USB device"}, {189, -1, "a USB device"},
	{195, -1, "a GPU"}, {226, -1, "a GPU"}, {202, -1, "machine registers"}, {203, -1, "CPU facts"},
}

func dumpDevice(d *Dumper, o *object) error {
	maj, minor := int(unix.Major(uint64(o.stat.Rdev))), int(unix.Minor(uint64(o.stat.Rdev)))
	dev := [2]int{maj, minor}
	if slices.Contains(stateless, dev) || dev == kernelLog && o.flags&unix.O_ACCMODE == unix.O_WRONLY {
		return dumpNode(d, o)
	}
	what := "of a kind that is not known"
	for _, s := range stateful {
		if s.major == maj && (s.minor < 0 || s.minor == minor) {
			what = s.what
			break
		}
	}
	d.refuse(o, fmt.Sprintf("character device %d:%d (%s) may have a state that cannot be read", maj, minor, what), "let the program close it")
	return nil
}

// dumpNode notes where the node of a device is.
func dumpNode(d *Dumper, o *object) error {
	maj, minor := int(unix.Major(uint64(o.stat.Rdev))), int(unix.Minor(uint64(o.stat.Rdev)))
	path, at := d.locate(o)
	if at == unlinked {
		if other := d.otherNode(o); other != "" {
			path, at = other, atPath
		}
	}
	o.fact(o.id).Rdev = uint64(o.stat.Rdev)
	switch at {
	case gone:
		o.path, o.dirOnly = d.standingDir(o), true
		o.entries = append(o.entries, d.regEntry(o, o.id, path))
		return d.addGhost(o, o.id)
	case unlinked:
		if d.opts.LinkRemap {
			return d.dumpLost(o, o.id)
		}
		d.refuse(o, fmt.Sprintf("character device %d:%d is no longer at its path", maj, minor),
			"take another node of it (--evasive-devices), or make the node again (mknod)")
		return nil
	}
	o.path = path
	o.entries = append(o.entries, d.regEntry(o, o.id, path))
	return nil
}

// memoryDevices is the major number of those that are the same everywhere:
// null, zero, full, random and urandom.
const memoryDevices = 1

// otherNode is a path of another node of o's device: the one that the kernel
// itself names. Which node of null or zero it is matters to nobody; for other
// devices it must be asked for.
func (d *Dumper) otherNode(o *object) string {
	maj, minor := unix.Major(uint64(o.stat.Rdev)), unix.Minor(uint64(o.stat.Rdev))
	if maj != memoryDevices && !d.opts.EvasiveDevices {
		return ""
	}
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/char/%d:%d/uevent", maj, minor))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME=")
		if !ok {
			continue
		}
		path := "/dev/" + strings.TrimPrefix(name, "/dev/")
		var st unix.Stat_t
		if unix.Stat(d.rootOf(o)+path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == o.stat.Rdev {
			return path
		}
	}
	return ""
}

func openDevice(r *Restorer, x *description) error {
	e := x.entry.GetReg()
	in, base, err := r.deviceNode(x, e)
	if err != nil {
		return err
	}
	if in == nil && r.remaps[x.id] == 0 {
		defer func() { _ = base.Close() }()
	} else if in != nil && in.Forward {
		return r.forward(x, in)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(base.Fd()), &st); err != nil {
		return &os.PathError{Op: "fstat", Path: base.Name(), Err: err}
	}
	if f := r.facts[x.id]; f != nil && in == nil && f.Rdev != 0 && f.Rdev != uint64(st.Rdev) {
		return fmt.Errorf("%s is device %d:%d here, expected %d:%d", base.Name(), unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev)),
			unix.Major(f.Rdev), unix.Minor(f.Rdev))
	}
	// O_NONBLOCK so that a device that waits for a carrier does not hold us up.
	f, err := reopen(base, reopenFlags(int(e.GetFlags()), false)|unix.O_NONBLOCK)
	if err != nil {
		return hinted(err)
	}
	x.file = f
	if err := setStatus(f, e.GetFlags()); err != nil && !errors.Is(err, unix.EPERM) {
		return err
	}
	return setPosition(f, e.GetPos())
}

// deviceNode gives the node to open: a handed one, a deleted one, or that at the path.
func (r *Restorer) deviceNode(x *description, e *regfile.RegFileEntry) (*Inherit, *os.File, error) {
	if id := r.remaps[x.id]; id != 0 && r.inherited(e) == nil {
		g := r.ghosts[id]
		if err := g.create(r, e); err != nil {
			return nil, nil, err
		}
		return nil, g.file, nil
	}
	return r.base(x, e)
}

// setStatus gives a description the recorded flags that F_SETFL changes.
// O_ASYNC is for the process to set.
func setStatus(f *os.File, flags uint32) error {
	want := int(flags) & settable &^ unix.O_ASYNC
	have, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return &os.PathError{Op: "fcntl F_GETFL", Path: f.Name(), Err: err}
	}
	if have&settable == want {
		return nil
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFL, want); err != nil {
		return &os.PathError{Op: fmt.Sprintf("fcntl F_SETFL %#x", want), Path: f.Name(), Err: err}
	}
	return nil
}

func isTTY(o *object) bool {
	_, err := unix.IoctlGetTermios(int(o.file.Fd()), unix.TCGETS)
	return err == nil
}
