package coordinator

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"godwit/wire"
)

func (a *app) cmdVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the release, the protocol version and the platform",
		Long:  `version prints the release, the protocol version and the platform of this program.`,
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if a.output == outputJSON {
				return writeJSON(a.stdout, struct {
					Version  string `json:"version"`
					Protocol int    `json:"protocol"`
					OS       string `json:"os"`
					Arch     string `json:"arch"`
					Go       string `json:"go"`
				}{Version, wire.Version, runtime.GOOS, runtime.GOARCH, runtime.Version()})
			}
			_, err := fmt.Fprintf(a.stdout, "godwit %s (protocol %d, %s/%s, %s)\n",
				Version, wire.Version, runtime.GOOS, runtime.GOARCH, runtime.Version())
			return err
		},
	}
}
