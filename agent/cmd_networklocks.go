package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"godwit/engine"
)

func cmdNetworkLocks() *cobra.Command {
	var output string
	var remove []string
	cmd := &cobra.Command{
		Use:   "network-locks",
		Short: "List, or remove, the network locks that dumps have left for their restores",
		Long: `A dump with --tcp-established locks the network for the TCP connections that lead
out of the tree: to their peers it is down until the restore, which unlocks it.
The lock of a dump that is never restored stays; this lists all of them and,
with --remove, takes one away: its connections then end as if the program had.

Exit codes: 0 done; 1 failed, or there is no such lock; 2 usage.`,
		Example: `  godwit-agent network-locks --remove 0b1c7a3e-5c1f-4f57-9e0a-0a6b7d0f2c11`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return usageError(cmd, fmt.Errorf("--output: %q is neither text nor json", output))
			}
			if err := needRoot("network-locks"); err != nil {
				return err
			}
			if len(remove) > 0 {
				return removeLocks(remove)
			}
			locks, err := engine.NetworkLocks()
			if err != nil {
				return err
			}
			return printLocks(locks, output, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVar(&output, "output", "text", "text or json")
	cmd.Flags().StringArrayVar(&remove, "remove", nil, "remove the lock of this name; may be repeated")
	return cmd
}

func removeLocks(ids []string) error {
	var errs []error
	for _, id := range ids {
		found, err := engine.UnlockNetwork(id)
		if err == nil && !found {
			err = fmt.Errorf("there is no network lock %s", id)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func printLocks(locks []engine.HeldLock, output string, out io.Writer) error {
	if output == "json" {
		type lock struct {
			ID          string   `json:"id"`
			Table       string   `json:"table"`
			Connections []string `json:"connections"`
		}
		list := []lock{}
		for _, l := range locks {
			list = append(list, lock{l.ID, l.Table, append([]string{}, l.Conns...)})
		}
		return json.NewEncoder(out).Encode(list)
	}
	for _, l := range locks {
		if _, err := fmt.Fprintf(out, "%s  %s\n", l.ID, strings.Join(l.Conns, ", ")); err != nil {
			return err
		}
	}
	return nil
}
