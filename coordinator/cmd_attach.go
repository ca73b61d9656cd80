package coordinator

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"godwit/transport"
	"godwit/wire"
)

// defaultPatience of attachments: a tree waits that long for a command that was cut
// off before its terminal hangs up.
const defaultHangUp = 5 * time.Minute

const hangUpHelp = "`time` that the tree waits for a command that was cut off, or killed, until its terminal hangs up; 0: for ever"

func (a *app) cmdAttach() *cobra.Command {
	var patience time.Duration
	cmd := &cobra.Command{
		Use:   "attach ID",
		Short: "Come back to the terminal of a tree that was moved with --attach",
		Long: `attach takes the place of the "godwit migrate --attach" of the migration ID that was
killed, or whose connection was lost, as long as the tree's terminal has not hung up.
What the tree has written since then is shown.

` + attachExitHelp,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.runAttach(cmd.Context(), args[0], patience)
		},
		ValidArgsFunction: a.completeIDs,
	}
	cmd.Flags().DurationVar(&patience, "hang-up-after", defaultHangUp, hangUpHelp)
	return cmd
}

const attachExitHelp = `Once attached, the exit code is that of the tree's root, as a shell has it; 255 if it
is not known; 0 if the tree runs on, without the terminal or on another host.`

func (a *app) runAttach(ctx context.Context, id string, patience time.Duration) error {
	if err := checkHangUp(patience); err != nil {
		return err
	}
	if a.output == outputJSON {
		return usagef("attach has no --output json")
	}
	in, out, err := a.ownTerminal()
	if err != nil {
		return err
	}
	l, rec, err := a.connectTo(ctx, id)
	if err != nil {
		return err
	}
	defer l.close()
	if rec.Options.GetAttach() == nil || rec.State != wire.State_STATE_COMPLETED {
		return wire.Errorf(wire.Code_CODE_NOT_FOUND, "migration %s has not moved a tree with --attach", id)
	}
	at, err := attach(l, rec, in, out, patience, "-"+transport.NewID())
	if err != nil {
		return err
	}
	defer func() { _ = at.close() }()
	call, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if _, err := transport.Call[*wire.AttachRequest, *wire.AttachReply](call, l.nc, rec.Destination, "attach",
		&wire.AttachRequest{Protocol: wire.Version, Attachment: at.asked}); err != nil {
		return err
	}
	return at.serve(ctx, a.interrupts)
}

func checkHangUp(d time.Duration) error {
	if d != 0 && d < 5*time.Second {
		return usagef("--hang-up-after %s: want at least 5s, or 0 to wait for ever", d)
	}
	return nil
}
