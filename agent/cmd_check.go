package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"godwit/engine"
)

func cmdCheck() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Try out what this kernel has of what the engine uses",
		Long: `Tries out each feature of the kernel that dump and restore use, on nothing but
this program itself, and says what is there.

Exit codes: 0 trees can be dumped and restored here; 1 something required is
missing; 2 usage.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return usageError(cmd, fmt.Errorf("--output: %q is neither text nor json", output))
			}
			if err := needRoot("check"); err != nil {
				return err
			}
			return reportFeatures(engine.Probe(), output, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVar(&output, "output", "text", "text or json")
	foreignFlags(cmd.Flags(), "all", "extra", "experimental", "feature", "ms")
	return cmd
}

// reportFeatures prints what a probe found; a lack of something required is an error.
func reportFeatures(fs []engine.Feature, output string, out io.Writer) error {
	type feature struct {
		Name     string `json:"name"`
		Answer   string `json:"answer"` // yes, no, unclear
		Required bool   `json:"required"`
		Use      string `json:"use"`
		Error    string `json:"error,omitempty"`
	}
	var list []feature
	var missing []string
	t := table.NewWriter()
	t.SetStyle(table.StyleLight)
	t.Style().Options = table.OptionsNoBordersAndSeparators
	t.AppendHeader(table.Row{"feature", "there", "needed", "for"})
	for _, f := range fs {
		j := feature{Name: f.Name, Answer: string(f.Answer), Required: f.Required, Use: f.Use}
		need := "no"
		if f.Required {
			need = "yes"
		}
		use := f.Use
		if f.Err != nil {
			j.Error = f.Err.Error()
			use += " (" + j.Error + ")"
		}
		if f.Required && f.Answer != engine.Yes {
			missing = append(missing, f.Name)
		}
		list = append(list, j)
		t.AppendRow(table.Row{j.Name, j.Answer, need, use})
	}
	var err error
	if output == "json" {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		err = enc.Encode(list)
	} else {
		_, err = io.WriteString(out, t.Render()+"\n")
	}
	if err == nil && missing != nil {
		err = errors.New("this host cannot dump or restore: it lacks " + strings.Join(missing, ", "))
	}
	return err
}
