package agent

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"godwit/wire"
)

func cmdVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the release, the protocol version and the platform",
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "godwit-agent %s (protocol %d, %s/%s, %s)\n",
				Version, wire.Version, runtime.GOOS, runtime.GOARCH, runtime.Version())
			return err
		},
	}
}
