package coordinator

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/spf13/cobra"

	"godwit/transport"
	"godwit/wire"
)

// withHosts adds to an error about a host that has no agent which hosts do.
func withHosts(ctx context.Context, nc *nats.Conn, host string, err error) error {
	if !errors.Is(err, transport.ErrNoAgent) {
		return err
	}
	infos, derr := transport.Discover(ctx, nc)
	if derr != nil {
		return err
	}
	var names []string
	for _, i := range infos {
		if i.Host == host {
			return err // it is there now
		}
		names = append(names, i.Host)
	}
	names = slices.Compact(names)
	have := "there is no agent on the bus at all"
	if len(names) > 0 {
		have = "the hosts on the bus are " + strings.Join(names, ", ")
	}
	return wire.Errorf(wire.Code_CODE_UNAVAILABLE, "%w; %s", err, have)
}

// completeHosts is the shell completion of a host's name.
func (a *app) completeHosts(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.hostNames(cmd, prefix), cobra.ShellCompDirectiveNoFileComp
}

// hostNames are the hosts on the bus; none if it cannot be asked, for a
// completion has nowhere to complain.
func (a *app) hostNames(cmd *cobra.Command, prefix string) []string {
	if a.setup(cmd) != nil {
		return nil
	}
	nc, err := a.connectBus()
	if err != nil {
		return nil
	}
	defer nc.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	infos, err := transport.Discover(ctx, nc)
	if err != nil {
		return nil
	}
	var names []string
	for _, i := range infos {
		if strings.HasPrefix(i.Host, prefix) {
			names = append(names, i.Host)
		}
	}
	return names
}

// completeIDs is the shell completion of a migration's id.
func (a *app) completeIDs(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 || a.setup(cmd) != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	l, err := a.connect(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer l.close()
	recs, err := l.records.List(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var ids []string
	for _, r := range recs {
		if strings.HasPrefix(r.Id, prefix) {
			ids = append(ids, r.Id+"\t"+route(r)+" "+r.State.Word())
		}
	}
	return ids, cobra.ShellCompDirectiveNoFileComp
}

// alive asks an agent for a sign of life. Only "no such agent" and "no answer"
// are signs of the contrary; if this side is cut off itself it cannot tell, and
// known is false.
func alive(ctx context.Context, nc *nats.Conn, host string) (is, known bool) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_, err := transport.Call[*wire.InfoRequest, *wire.InfoReply](ctx, nc, host, "info", &wire.InfoRequest{})
	switch {
	case errors.Is(err, transport.ErrNoAgent), errors.Is(err, transport.ErrNoAnswer):
		return false, nc.IsConnected()
	case wire.CodeOf(err) == wire.Code_CODE_UNAVAILABLE, ctx.Err() != nil:
		return false, false
	}
	return true, true
}
