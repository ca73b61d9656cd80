package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"godwit/engine"
)

func cmdCheck() *cobra.Command {
	var output string
	var f checkFlags
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Try out what this kernel has of what the engine uses",
		Long: `Tries out each feature of the kernel that dump and restore use, on nothing but
this program itself, and says what is there. --feature, which may be repeated,
asks for single ones by CRIU's names or by those of the list. One that CRIU has
and that is not used here counts as missing, whatever the kernel has.

Exit codes: 0 trees can be dumped and restored here, or what was asked for is
there; 1 something required is missing, with --all or --extra anything of the
list; 2 usage.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return usageError(cmd, fmt.Errorf("--output: %q is neither text nor json", output))
			}
			if err := needRoot("check"); err != nil {
				return err
			}
			probes := engine.Probe()
			if slices.Contains(f.features, "list") {
				_, err := io.WriteString(cmd.OutOrStdout(), strings.Join(featureNames(probes), "\n")+"\n")
				return err
			}
			if len(f.features) > 0 {
				err := askFeatures(f.features, probes)
				if err == nil && output == "text" {
					_, err = io.WriteString(cmd.OutOrStdout(), looksGood)
				}
				return err
			}
			return reportFeatures(probes, f.all || f.extra, output, cmd.OutOrStdout())
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&output, "output", "text", "text or json")
	fs.StringArrayVar(&f.features, "feature", nil, "only whether this is there; may be repeated; list prints all names")
	fs.BoolVar(&f.all, "all", false, "fail if anything is missing, not only what all trees need")
	fs.BoolVar(&f.extra, "extra", false, "the same as --all: nothing experimental is used")
	foreignFlags(fs, "experimental", "ms")
	f.config.add(cmd)
	return cmd
}

type checkFlags struct {
	features   []string
	all, extra bool
	config     configFlags
}

// looksGood is what CRIU prints.
const looksGood = "Looks good.\n"

// reportFeatures prints what a probe found; a lack of something required, with
// all of anything, is an error.
func reportFeatures(fs []engine.Feature, all bool, output string, out io.Writer) error {
	type feature struct {
		Name     string `json:"name"`
		Answer   string `json:"answer"` // yes, no, unclear
		Required bool   `json:"required"`
		Use      string `json:"use"`
		Error    string `json:"error,omitempty"`
	}
	var list []feature
	var missing, optional []string
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
		} else if f.Answer != engine.Yes {
			optional = append(optional, f.Name)
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
	if err == nil && missing == nil && optional != nil && all {
		err = errors.New("some trees cannot be dumped or restored on this host, or more slowly: it lacks " + strings.Join(optional, ", "))
	}
	if err == nil && missing == nil && output == "text" {
		_, err = io.WriteString(out, looksGood)
	}
	if err == nil && missing != nil {
		err = errors.New("this host cannot dump or restore: it lacks " + strings.Join(missing, ", "))
	}
	return err
}
