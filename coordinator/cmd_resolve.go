package coordinator

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"godwit/coordinator/rules"
	"godwit/wire"
)

// resolveArgs are the arguments of resolve.
type resolveArgs struct {
	destinationDead, sourceDead, yes bool
	wait                             time.Duration
}

func (a *app) cmdResolve() *cobra.Command {
	var args resolveArgs
	cmd := &cobra.Command{
		Use:   "resolve ID --destination-is-dead|--source-is-dead",
		Short: "End a migration whose other host is known to be dead",
		Long: `resolve ends a migration that waits for a host which will not answer any more. It is
the operator's word that this host runs nothing of the tree: switched off, or fenced.
The command says what will happen, and asks.

--destination-is-dead: the destination had committed to run the tree and is silent. The
frozen copy at the source runs on. If the destination was alive after all and comes
back, it kills its copy, but until then two run.

--source-is-dead: the source died before all of the tree had travelled, and the tree
with it. The destination removes what it had built, or ends what runs there and
waits for memory (post-copy).

A host whose agent answers is not dead: the command then changes nothing and fails.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, argv []string) error {
			ctx, cancel := a.untilInterrupt(cmd.Context())
			defer cancel()
			return a.runResolve(ctx, argv[0], args)
		},
		ValidArgsFunction: a.completeIDs,
	}
	f := cmd.Flags()
	f.BoolVar(&args.destinationDead, "destination-is-dead", false, "the destination runs nothing of the tree, for certain")
	f.BoolVar(&args.sourceDead, "source-is-dead", false, "the source runs nothing of the tree, for certain")
	f.BoolVar(&args.yes, "yes", false, "do not ask")
	f.DurationVar(&args.wait, "wait", time.Minute, "`time` to wait for the end of the migration")
	return cmd
}

func (a *app) runResolve(ctx context.Context, id string, args resolveArgs) error {
	switch {
	case args.destinationDead == args.sourceDead:
		return usagef("say which host is dead: --destination-is-dead or --source-is-dead")
	case args.wait <= 0:
		return usagef("--wait %s: want more than zero", args.wait)
	}
	l, rec, err := a.connectTo(ctx, id)
	if err != nil {
		return err
	}
	defer l.close()
	dead := rec.Source
	if args.destinationDead {
		dead = rec.Destination
	}
	what, err := resolution(rec, args.destinationDead)
	if err != nil {
		return err
	}
	if is, known := alive(ctx, l.nc, dead); (is || !known) && !stuck(rec) {
		if is {
			return wire.Errorf(wire.Code_CODE_CONFLICT, "agent %s answers, so its host is not dead: it brings the migration to its end by itself; if it must not, switch the host off first", dead)
		}
		return wire.Errorf(wire.Code_CODE_UNAVAILABLE, "it cannot be found out whether agent %s is there: this command has no connection to the bus", dead)
	}
	if !args.yes {
		if err := a.confirm(what); err != nil {
			return err
		}
	}
	if rec, err = declareDead(ctx, l, rec, dead, args.destinationDead); err != nil {
		return err
	}
	return a.awaitAborted(ctx, l, rec, args.wait, func(r *wire.Record) string {
		if args.sourceDead {
			return fmt.Sprintf("%s is lost with %s, and %s has nothing of it", subject(r), r.Source, r.Destination)
		}
		return fmt.Sprintf("%s runs on at %s", subject(r), r.Source)
	})
}

// resolution says what declaring a host dead means for a migration, or why that
// changes nothing.
func resolution(r *wire.Record, destinationDead bool) (string, error) {
	no := func(format string, args ...any) (string, error) {
		return "", wire.Errorf(wire.Code_CODE_CONFLICT, "migration %s is %s: %s", r.Id, r.State.Word(), fmt.Sprintf(format, args...))
	}
	switch rules.Pronounce(r.State, destinationDead) {
	case rules.Ended:
		return no("it has ended already")
	case rules.TooEarly:
		return no("%s has not committed, so the tree runs on at %s by itself: use godwit abort", r.Destination, r.Source)
	case rules.Returns:
		return no("%s lets the tree run already", r.Source)
	case rules.NotNeeded:
		return no("the tree belongs to %s now, which does not need %s", r.Destination, r.Source)
	case rules.Rewinds:
		return fmt.Sprintf("%s of migration %s will run on at %s from where it was frozen; what it has done at %s since is lost.\nIf %s still runs it, two copies run from now on.", subject(r), r.Id, r.Source, r.Destination, r.Destination), nil
	case rules.Ends:
		return fmt.Sprintf("Memory of %s that is still at %s is lost, so the tree is ended at %s.", subject(r), r.Source, r.Destination), nil
	case rules.GivesBack:
		return fmt.Sprintf("%s of migration %s will run on at %s from where it was frozen.\nIf %s still runs it, two copies run from now on.", subject(r), r.Id, r.Source, r.Destination), nil
	}
	return fmt.Sprintf("Migration %s ends, and %s counts as lost with %s.\nIf %s still runs it, it runs on there.", r.Id, subject(r), r.Source, r.Source), nil
}

// confirm asks whoever is at the terminal.
func (a *app) confirm(what string) error {
	if !term.IsTerminal(int(os.Stdin.Fd())) {
		return usagef("there is no terminal to ask at; add --yes if this is meant:\n%s", what)
	}
	if _, err := fmt.Fprintf(a.stderr, "%s\nType yes if that is meant: ", what); err != nil {
		return err
	}
	line, err := bufio.NewReader(os.Stdin).ReadString('\n')
	if err != nil || strings.TrimSpace(line) != "yes" {
		return wire.Errorf(wire.Code_CODE_ABORTED, "nothing was changed")
	}
	return nil
}

// declareDead writes the operator's word into the record.
func declareDead(ctx context.Context, l *link, rec *wire.Record, dead string, destination bool) (*wire.Record, error) {
	return l.records.Change(ctx, rec.Id, func(r *wire.Record) error {
		if _, err := resolution(r, destination); err != nil {
			return err
		}
		return pronounce(r, destination, fmt.Sprintf("an operator declared %s dead", dead))
	})
}

// pronounce moves a record to where the death of a host leads.
func pronounce(r *wire.Record, destination bool, reason string) error {
	for _, to := range rules.Pronounce(r.State, destination).Steps(r.State) {
		if err := r.Move(to, wire.RoleCoordinator, coordinatorName, time.Now()); err != nil {
			return err
		}
	}
	r.Reason = reason
	r.Error = wire.ErrorOf(wire.Errorf(wire.Code_CODE_ABORTED, "%s", reason))
	return nil
}
