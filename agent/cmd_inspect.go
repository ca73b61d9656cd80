package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/hashicorp/go-hclog"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"godwit/configs/external"
	"godwit/engine"
	"godwit/engine/plan"
	"godwit/wire"
)

type inspectFlags struct {
	tree     int
	external []string
	output   string
}

func cmdInspect() *cobra.Command {
	var f inspectFlags
	cmd := &cobra.Command{
		Use:   "inspect -t PID",
		Short: "Show what a running process tree holds and whether it can be dumped",
		Long: `Looks at the tree of PID as a dump would, without touching it, and prints its
processes, every object that it has open, maps, runs or stands on, with who holds
it, its key, its flags, its offset and how it is carried (in the image, by its path,
external, or refused and why), and what a destination must have: files, external
files and free ports.

Exit codes: 0 it can be dumped; 1 failed; 2 usage; 4 it cannot be dumped, the
list of what stands in the way is on stderr.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.tree <= 0 {
				return usageError(cmd, errors.New("no tree is named: give the pid of its root with --tree"))
			}
			if f.output != "text" && f.output != "json" {
				return usageError(cmd, fmt.Errorf("--output: %q is neither text nor json", f.output))
			}
			if err := needRoot("inspect"); err != nil {
				return err
			}
			return runInspect(cmd.Context(), engine.New(hclog.NewNullLogger()), f, cmd.OutOrStdout())
		},
	}
	fs := cmd.Flags()
	fs.IntVarP(&f.tree, "tree", "t", 0, "pid of the tree's root")
	fs.StringArrayVar(&f.external, "external", nil, "take this as external: a key, file[mnt_id:inode], tty[rdev:dev], pipe[inode], unix[inode], or fd:PID:N, role:stdin, path:GLOB, kind:KIND; may be repeated")
	fs.StringVar(&f.output, "output", "text", "text or json")
	return cmd
}

func runInspect(ctx context.Context, eng Engine, f inspectFlags, out io.Writer) error {
	opts, err := selectKeys(ctx, eng, f.tree, engine.DumpOptions{External: f.external, FileLocks: true, ExtUnixSk: true, TCPEstablished: true}, hclog.NewNullLogger())
	if f, ok := errors.AsType[*wire.Failure](err); ok && f.Code == wire.Code_CODE_INVALID {
		return &exitError{code: wire.ExitUsage, err: err}
	}
	if err != nil {
		return refusedExit(err)
	}
	p, refusal := eng.Plan(ctx, f.tree, opts)
	if refusal != nil {
		refusal = refusedExit(refusal)
	}
	if p == nil {
		return refusal
	}
	if f.output == "json" {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		return errors.Join(refusal, enc.Encode(p))
	}
	return errors.Join(refusal, printPlan(out, p))
}

// refusedExit gives a refusal its exit code; its text has the whole list.
func refusedExit(err error) error {
	if _, ok := errors.AsType[*engine.Refusal](err); ok {
		return &exitError{code: wire.ExitRefused, err: err}
	}
	return err
}

func printPlan(out io.Writer, p *engine.Plan) error {
	var b strings.Builder
	fmt.Fprintf(&b, "Tree of pid %d: %d processes, %d threads, %s of memory, %d open files (%s, %s)\n",
		p.Pid, len(p.Tasks), threads(p), sizeText(p.MemoryBytes), p.OpenFiles, p.Arch, p.Kernel)
	section := func(title string, header table.Row, rows []table.Row) {
		if len(rows) == 0 {
			return
		}
		t := table.NewWriter()
		t.SetStyle(table.StyleLight)
		t.Style().Options = table.OptionsNoBordersAndSeparators
		t.AppendHeader(header)
		t.AppendRows(rows)
		fmt.Fprintf(&b, "\n%s\n%s\n", title, t.Render())
	}
	var rows []table.Row
	for _, t := range p.Tasks {
		rows = append(rows, table.Row{t.Pid, t.VPid, t.PPid, len(t.VTids), sizeText(t.RSS), t.Comm})
	}
	section("Processes", table.Row{"pid", "inner pid", "parent", "threads", "memory", "command"}, rows)
	rows = nil
	for _, o := range p.Objects {
		name := o.Path
		if name == "" {
			name = o.Link
		}
		how := o.Carry
		if o.Reason != "" {
			how += ": " + o.Reason
		}
		held := objectHolders(o.Holders)
		if h := o.Inherited; h != nil {
			held += fmt.Sprintf(", inherited from %d %s", h.Pid, h.Comm)
		}
		rows = append(rows, table.Row{held, o.Kind, o.Key, fmt.Sprintf("%#o", o.Flags), o.Offset, how, name})
	}
	section("Open, mapped or stood on", table.Row{"held by", "kind", "key", "flags", "offset", "carried", "object"}, rows)
	rows = nil
	for _, f := range p.Files {
		rows = append(rows, table.Row{f.Kind, fileUse(f.Mapped, f.Writable, f.Create), sizeText(f.Size), holders(f.Pids), f.Path})
	}
	section("Files that must be at the destination", table.Row{"kind", "use", "size", "pids", "path"}, rows)
	rows = nil
	for _, e := range p.External {
		rows = append(rows, table.Row{e.Key, e.Kind, fmt.Sprintf("%#o", e.Flags), e.Path})
	}
	section("External files, to be handed in at the destination", table.Row{"key", "kind", "flags", "path here"}, rows)
	rows = nil
	for _, q := range p.Ports {
		rows = append(rows, table.Row{q.Network, q.Address, q.Pid})
	}
	section("Ports that must be free at the destination", table.Row{"network", "address", "pid"}, rows)
	_, err := io.WriteString(out, b.String())
	return err
}

func fileUse(mapped, writable, create bool) string {
	var use []string
	if mapped {
		use = append(use, "mapped")
	}
	if writable {
		use = append(use, "written")
	}
	if create {
		use = append(use, "made anew")
	}
	if use == nil {
		return "read"
	}
	return strings.Join(use, ", ")
}

// objectHolders lists pids with their descriptors and other roles, shortened.
func objectHolders(hs []plan.Holder) string {
	var out []string
	for i, h := range hs {
		if i == 3 {
			out = append(out, fmt.Sprintf("and %d more", len(hs)-i))
			break
		}
		s := fmt.Sprint(h.Pid)
		for _, n := range h.FDs[:min(len(h.FDs), 4)] {
			s += fmt.Sprintf(" %d", n)
		}
		for _, r := range h.Roles {
			if !slices.Contains(external.Roles, r) {
				s += " " + r
			}
		}
		out = append(out, s)
	}
	return strings.Join(out, ", ")
}

// holders lists pids, shortened.
func holders(pids []int) string {
	var s []string
	for i, p := range pids {
		if i == 4 {
			s = append(s, fmt.Sprintf("and %d more", len(pids)-i))
			break
		}
		s = append(s, fmt.Sprint(p))
	}
	return strings.Join(s, " ")
}

// sizeText is a number of bytes with a binary unit and three digits.
func sizeText(n uint64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n), ""
	for _, unit = range []string{"KiB", "MiB", "GiB", "TiB", "PiB"} {
		v /= 1024
		if v < 1000 {
			break
		}
	}
	digits := 0
	if v < 10 {
		digits = 2
	} else if v < 100 {
		digits = 1
	}
	return fmt.Sprintf("%.*f %s", digits, v, unit)
}
