package coordinator

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"godwit/transport"
	"godwit/wire"
)

func (a *app) cmdPs() *cobra.Command {
	var all, proxies bool
	cmd := &cobra.Command{
		Use:   "ps HOST",
		Short: "Show the process trees of a host",
		Long: `ps shows the processes of a host as trees: pid, owner, state, resident memory,
threads and open files. HOST:PID is what "godwit migrate" moves: that process
with all its descendants. Behind them it shows the proxies of the host: objects
whose bytes go on flowing between the host where they are and a tree that runs
on another one.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := a.untilInterrupt(cmd.Context())
			defer cancel()
			return a.runPs(ctx, args[0], all, proxies)
		},
		ValidArgsFunction: a.completeHosts,
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "kernel threads, too")
	cmd.Flags().BoolVar(&proxies, "proxies", false, "only proxies")
	return cmd
}

// processDoc is one process for programs.
type processDoc struct {
	PID          int32  `json:"pid"`
	PPID         int32  `json:"ppid"`
	Comm         string `json:"comm"`
	Command      string `json:"command"`
	RSSBytes     uint64 `json:"rss_bytes"`
	Threads      uint32 `json:"threads"`
	OpenFiles    uint32 `json:"open_files"`
	UID          uint32 `json:"uid"`
	State        string `json:"state"`
	KernelThread bool   `json:"kernel_thread,omitempty"`
}

func newProcessDoc(p *wire.Process) processDoc {
	return processDoc{
		PID: p.Pid, PPID: p.Ppid, Comm: p.Comm, Command: p.Command, RSSBytes: p.RssBytes, Threads: p.Threads,
		OpenFiles: p.OpenFiles, UID: p.Uid, State: p.State, KernelThread: p.KernelThread,
	}
}

// proxyDoc is one end of a proxy for programs.
type proxyDoc struct {
	ID            string `json:"id"`
	Migration     string `json:"migration"`
	Object        string `json:"object"`
	End           string `json:"end"` // "home": the object is here; "tree"
	Peer          string `json:"peer,omitempty"`
	State         string `json:"state"`
	SentBytes     uint64 `json:"sent_bytes"`
	ReceivedBytes uint64 `json:"received_bytes"`
	WaitingBytes  uint64 `json:"waiting_bytes"`
}

func newProxyDoc(p *wire.ProxyState) proxyDoc {
	d := proxyDoc{ID: p.Id, Migration: p.Migration, Object: printable(p.Object), End: "tree", Peer: p.Peer, State: p.State,
		SentBytes: p.SentBytes, ReceivedBytes: p.ReceivedBytes, WaitingBytes: p.WaitingBytes}
	if p.Home {
		d.End = "home"
	}
	return d
}

func (a *app) runPs(ctx context.Context, host string, all, onlyProxies bool) error {
	nc, err := a.connectBus()
	if err != nil {
		return err
	}
	defer nc.Close()
	reply, err := transport.Call[*wire.PsRequest, *wire.PsReply](ctx, nc, host, "ps", &wire.PsRequest{})
	if err != nil {
		return withHosts(ctx, nc, host, err)
	}
	info, err := transport.Call[*wire.InfoRequest, *wire.InfoReply](ctx, nc, host, "info", &wire.InfoRequest{})
	if err != nil {
		return withHosts(ctx, nc, host, err)
	}
	proxies := []proxyDoc{}
	for _, p := range info.GetInfo().GetProxies() {
		proxies = append(proxies, newProxyDoc(p))
	}
	slices.SortFunc(proxies, func(a, b proxyDoc) int { return cmp.Compare(a.ID+a.End, b.ID+b.End) })
	processes := reply.Processes
	if !all {
		processes = slices.DeleteFunc(processes, func(p *wire.Process) bool { return p.KernelThread })
	}
	if a.output == outputJSON {
		docs := []processDoc{}
		for _, p := range processes {
			docs = append(docs, newProcessDoc(p))
		}
		return writeJSON(a.stdout, struct {
			Host      string       `json:"host"`
			Processes []processDoc `json:"processes"`
			Proxies   []proxyDoc   `json:"proxies,omitempty"`
		}{host, docs, proxies})
	}
	if !onlyProxies {
		printProcesses(a.stdout, processes, terminalWidth(a.stdout))
	}
	return printProxies(a.stdout, proxies, onlyProxies)
}

// printProxies prints a table, or nothing if there are none and nobody asked for them.
func printProxies(w io.Writer, proxies []proxyDoc, asked bool) error {
	if len(proxies) == 0 {
		if !asked {
			return nil
		}
		_, err := fmt.Fprintln(w, "No proxy is in use on this host.")
		return err
	}
	t := newTable(w, "PROXY OF", "HERE IS", "PEER", "STATE", "SENT", "RECEIVED", "WAITING", "MIGRATION")
	rightAlign(t, 5, 6, 7)
	for _, p := range proxies {
		t.AppendRow(table.Row{p.Object, "the " + map[string]string{"home": "object", "tree": "tree"}[p.End], p.Peer, p.State,
			formatBytes(p.SentBytes), formatBytes(p.ReceivedBytes), formatBytes(p.WaitingBytes), p.Migration})
	}
	t.Render()
	return nil
}

// printProcesses prints trees; width bounds a line, 0 does not.
func printProcesses(w io.Writer, processes []*wire.Process, width int) {
	t := newTable(w, "PID", "UID", "STATE", "MEMORY", "THREADS", "FILES", "COMMAND")
	rightAlign(t, 1, 2, 4, 5, 6)
	children := map[int32][]*wire.Process{}
	known := map[int32]bool{}
	for _, p := range processes {
		known[p.Pid] = true
	}
	for _, p := range processes {
		parent := p.Ppid
		if !known[parent] || parent == p.Pid {
			parent = 0
		}
		children[parent] = append(children[parent], p)
	}
	shown := map[int32]bool{}
	var walk func(p *wire.Process, lead, childLead string)
	walk = func(p *wire.Process, lead, childLead string) {
		if shown[p.Pid] { // processes that come and go while they are read can make a circle
			return
		}
		shown[p.Pid] = true
		command := printable(p.Command)
		if strings.TrimSpace(command) == "" {
			command = "[" + printable(p.Comm) + "]"
		}
		t.AppendRow(table.Row{p.Pid, p.Uid, p.State, formatBytes(p.RssBytes), p.Threads, p.OpenFiles, lead + command})
		kids := children[p.Pid]
		slices.SortFunc(kids, func(a, b *wire.Process) int { return cmp.Compare(a.Pid, b.Pid) })
		for i, k := range kids {
			if i == len(kids)-1 {
				walk(k, childLead+"└─ ", childLead+"   ")
			} else {
				walk(k, childLead+"├─ ", childLead+"│  ")
			}
		}
	}
	roots := children[0]
	slices.SortFunc(roots, func(a, b *wire.Process) int { return cmp.Compare(a.Pid, b.Pid) })
	for _, p := range roots {
		walk(p, "", "")
	}
	for _, p := range processes {
		walk(p, "", "")
	}
	style := t.Style()
	if width > 0 {
		style.Size.WidthMax = width
	}
	t.Render()
}

// printable keeps a command line from moving the cursor or colouring the
// terminal: it is the text of whoever started the process.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, s)
}
