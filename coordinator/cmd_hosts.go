package coordinator

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/jedib0t/go-pretty/v6/text"
	"github.com/spf13/cobra"

	"godwit/transport"
	"godwit/wire"
)

func (a *app) cmdHosts() *cobra.Command {
	return &cobra.Command{
		Use:   "hosts",
		Short: "List the hosts that have an agent",
		Long:  `hosts lists the agents on the bus, with their hosts' kernel, memory and processors.`,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := a.untilInterrupt(cmd.Context())
			defer cancel()
			return a.runHosts(ctx)
		},
	}
}

// hostDoc is one host for programs.
type hostDoc struct {
	Host           string `json:"host"`
	Version        string `json:"version"`
	Protocol       uint32 `json:"protocol"`
	Kernel         string `json:"kernel"`
	Arch           string `json:"arch"`
	BootID         string `json:"boot_id,omitempty"`
	MemoryBytes    uint64 `json:"memory_bytes"`
	AvailableBytes uint64 `json:"available_bytes"`
	CPUs           uint32 `json:"cpus"`
	Migrations     uint32 `json:"migrations"`
	// ProxiesHome are objects of this host whose bytes go to and come from trees
	// elsewhere, for which it is still needed; ProxiesTree those of trees that run here.
	ProxiesHome int        `json:"proxies_home"`
	ProxiesTree int        `json:"proxies_tree"`
	Started     *time.Time `json:"started,omitempty"`
	PID         uint32     `json:"agent_pid"`
}

func (a *app) runHosts(ctx context.Context) error {
	nc, err := a.connectBus()
	if err != nil {
		return err
	}
	defer nc.Close()
	infos, err := transport.Discover(ctx, nc)
	if err != nil {
		return err
	}
	if a.output == outputJSON {
		docs := []hostDoc{}
		for _, i := range infos {
			home, tree := countProxies(i)
			docs = append(docs, hostDoc{ProxiesHome: home, ProxiesTree: tree,
				Host: i.Host, Version: i.Version, Protocol: i.Protocol, Kernel: i.Kernel, Arch: i.Arch, BootID: i.BootId,
				MemoryBytes: i.MemoryBytes, AvailableBytes: i.AvailableBytes, CPUs: i.Cpus, Migrations: i.Migrations,
				Started: stamp(i.StartedUnix * 1000), PID: i.Pid,
			})
		}
		return writeJSON(a.stdout, struct {
			Hosts []hostDoc `json:"hosts"`
		}{docs})
	}
	return printHosts(a.stdout, infos, time.Now())
}

func printHosts(w io.Writer, infos []*wire.AgentInfo, now time.Time) error {
	if len(infos) == 0 {
		_, err := fmt.Fprintln(w, "No agent is on the bus. Start one on each host: godwit-agent run")
		return err
	}
	t := newTable(w, "HOST", "AGENT", "KERNEL", "CPUS", "MEMORY", "AVAILABLE", "MIGRATIONS", "UP")
	needed := ""
	rightAlign(t, 4, 5, 6, 7, 8)
	count := map[string]int{}
	for _, i := range infos {
		count[i.Host]++
		version := i.Version
		if i.Protocol != wire.Version {
			version += fmt.Sprintf(" (protocol %d, this is %d)", i.Protocol, wire.Version)
		}
		up := "-"
		if i.StartedUnix != 0 {
			up = formatDuration(now.Sub(time.Unix(i.StartedUnix, 0)))
		}
		if home, _ := countProxies(i); home > 0 {
			needed += fmt.Sprintf("%s is still needed by trees that have left it, for the bytes of %s (godwit ps %s --proxies).\n", i.Host, plural(home, "object"), i.Host)
		}
		t.AppendRow(table.Row{i.Host, version, i.Kernel + " " + i.Arch, i.Cpus, formatBytes(i.MemoryBytes), formatBytes(i.AvailableBytes), i.Migrations, up})
	}
	t.Render()
	if _, err := io.WriteString(w, needed); err != nil {
		return err
	}
	for _, i := range infos {
		if n := count[i.Host]; n > 1 {
			count[i.Host] = 0
			if _, err := fmt.Fprintf(w, "%d agents call themselves %s: give all but one another name (host in agent.toml).\n", n, i.Host); err != nil {
				return err
			}
		}
	}
	return nil
}

// countProxies counts the proxies of a host's objects, and of the trees on it.
func countProxies(i *wire.AgentInfo) (home, tree int) {
	for _, p := range i.Proxies {
		if p.Home {
			home++
		} else {
			tree++
		}
	}
	return home, tree
}

// newTable returns a plain table: columns, no lines.
func newTable(w io.Writer, header ...any) table.Writer {
	t := table.NewWriter()
	t.SetOutputMirror(w)
	style := table.StyleDefault
	style.Options = table.OptionsNoBordersAndSeparators
	style.Box.PaddingLeft = ""
	style.Box.PaddingRight = "   "
	style.Format.Header = text.FormatDefault
	t.SetStyle(style)
	t.SuppressTrailingSpaces()
	t.AppendHeader(header)
	return t
}

func rightAlign(t table.Writer, columns ...int) {
	var cc []table.ColumnConfig
	for _, n := range columns {
		cc = append(cc, table.ColumnConfig{Number: n, Align: text.AlignRight, AlignHeader: text.AlignRight})
	}
	t.SetColumnConfigs(cc)
}
