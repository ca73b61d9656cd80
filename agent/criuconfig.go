package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"godwit/wire"
)

// Configuration files of the local commands have CRIU's form: one option a line,
// named as on the command line without the dashes, its argument behind white
// space and in double quotes if it holds white space itself; # begins a comment.

// systemConfig is read first, if it exists; the user's own comes next.
const systemConfig = "/etc/criu/default.conf"

// configEnv names one more file.
const configEnv = "CRIU_CONFIG_FILE"

type configFlags struct {
	file      string
	noDefault bool
}

// add makes the options known and has the files read after the command line,
// which wins over them.
func (c *configFlags) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&c.file, "config", "", "read options from this file too; the command line wins")
	fs.BoolVar(&c.noDefault, "no-default-config", false, "do not read "+systemConfig+" and $HOME/.criu/default.conf")
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		if err := c.apply(cmd); err != nil {
			code := wire.ExitFailed
			if cmd.Name() == "check" {
				code = wire.ExitUsage
			}
			return &exitError{code: code, err: err}
		}
		return nil
	}
}

// apply reads all files, in the order in which a later one wins.
func (c *configFlags) apply(cmd *cobra.Command) error {
	var opts []configOption
	read := func(path string, must bool) error {
		b, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) && !must {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the configuration: %w", err)
		}
		list, err := parseConfig(string(b))
		for i := range list {
			list[i].file = path
		}
		opts = append(opts, list...)
		if err != nil {
			return fmt.Errorf("configuration file %s, %w", path, err)
		}
		return nil
	}
	if !c.noDefault {
		if err := read(systemConfig, false); err != nil {
			return err
		}
		if home := os.Getenv("HOME"); filepath.IsAbs(home) {
			if err := read(filepath.Join(home, ".criu/default.conf"), false); err != nil {
				return err
			}
		}
	}
	if path := os.Getenv(configEnv); path != "" {
		if err := read(path, true); err != nil {
			return err
		}
	}
	if c.file != "" {
		if err := read(c.file, true); err != nil {
			return err
		}
	}
	return setOptions(cmd, opts)
}

// configOption is one line.
type configOption struct {
	file  string
	line  int
	name  string
	value string
	has   bool // a value
}

// parseConfig takes the text of a file apart. An error begins with its line.
func parseConfig(text string) ([]configOption, error) {
	var out []configOption
	n := 0
	for line := range strings.Lines(text) {
		n++
		words, err := configWords(line)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		if len(words) == 0 {
			continue
		}
		o := configOption{line: n, name: words[0]}
		if strings.HasPrefix(o.name, "-") {
			return nil, fmt.Errorf("line %d: %q: options have no dashes here", n, o.name)
		}
		if len(words) > 2 {
			return nil, fmt.Errorf("line %d: %q stands behind the argument of %s; put an argument with white space into double quotes", n, words[2], o.name)
		}
		if len(words) == 2 {
			o.value, o.has = words[1], true
		}
		out = append(out, o)
	}
	return out, nil
}

// configWords splits a line at white space. Inside double quotes \" is a quote,
// and every other \ stands for itself.
func configWords(line string) ([]string, error) {
	var words []string
	for {
		line = strings.TrimLeft(line, " \t\r\n\v\f")
		if line == "" || line[0] == '#' {
			return words, nil
		}
		if line[0] != '"' {
			end := strings.IndexAny(line, " \t\r\n\v\f#")
			if end < 0 {
				end = len(line)
			}
			words = append(words, line[:end])
			line = line[end:]
			continue
		}
		var w strings.Builder
		i := 1
		for ; i < len(line) && line[i] != '"'; i++ {
			if line[i] == '\\' && i+1 < len(line) && line[i+1] == '"' {
				i++
			}
			w.WriteByte(line[i])
		}
		if i == len(line) {
			return nil, errors.New("a double quote is not closed")
		}
		words = append(words, w.String())
		line = line[i+1:]
	}
}

// setOptions sets options of files that the command line has not set. Options of
// another local command are passed over, as one file serves all of them.
func setOptions(cmd *cobra.Command, opts []configOption) error {
	fs := cmd.Flags()
	given := map[string]bool{}
	fs.Visit(func(f *pflag.Flag) {
		given[f.Name] = true
		if n, ok := f.Value.(negation); ok {
			given[n.of.Name] = true
		}
	})
	lists := map[string][]string{}
	for _, o := range opts {
		where := fmt.Sprintf("configuration file %s, line %d: ", o.file, o.line)
		f, value := fs.Lookup(o.name), o.value
		target := o.name
		if n, ok := strings.CutPrefix(o.name, "no-"); ok && !o.has {
			x := fs.Lookup(n)
			if x != nil && x.Value.Type() == "bool" {
				f, target, value, o.has = x, n, "false", true
			} else if _, ok := asForeign(x); ok {
				continue // not to be done is what is done
			}
		}
		switch {
		case f == nil && elsewhere(cmd, o.name):
			continue
		case f == nil:
			return fmt.Errorf("%sunknown option %q", where, o.name)
		case target == "config" || target == "no-default-config" || target == "help":
			return fmt.Errorf("%s%s has no meaning inside of a configuration file", where, o.name)
		case f.NoOptDefVal != "" && !o.has:
			value = f.NoOptDefVal
		case f.Value.Type() == "bool" && o.has && target == o.name:
			return fmt.Errorf("%s%s takes no argument, %q is given", where, o.name, o.value)
		case !o.has:
			return fmt.Errorf("%s%s needs an argument", where, o.name)
		}
		if _, isList := f.Value.(pflag.SliceValue); isList {
			lists[target] = append(lists[target], value)
			continue
		}
		if given[target] {
			continue
		}
		if err := fs.Set(target, value); err != nil {
			if fe, ok := errors.AsType[foreignError](err); ok {
				err = fe
			}
			return fmt.Errorf("%s%w", where, err)
		}
	}
	for name, list := range lists {
		f := fs.Lookup(name)
		sv := f.Value.(pflag.SliceValue)
		if given[name] {
			list = append(list, sv.GetSlice()...)
		}
		if err := sv.Replace(list); err != nil {
			return fmt.Errorf("set --%s: %w", name, err)
		}
	}
	return nil
}

// elsewhere says whether another command that reads such files has the option.
func elsewhere(cmd *cobra.Command, name string) bool {
	parent := cmd.Parent()
	if parent == nil {
		return false
	}
	for _, c := range parent.Commands() {
		if c == cmd || c.Flags().Lookup("no-default-config") == nil {
			continue
		}
		if c.Flags().Lookup(name) != nil || c.Flags().Lookup(strings.TrimPrefix(name, "no-")) != nil {
			return true
		}
	}
	return false
}

// asForeign says whether f is an option of CRIU that is not carried out.
func asForeign(f *pflag.Flag) (foreign, bool) {
	if f == nil {
		return "", false
	}
	v, ok := f.Value.(foreign)
	return v, ok
}

// negation is --no-NAME of the option of.
type negation struct{ of *pflag.Flag }

func (negation) String() string { return "" }
func (negation) Type() string   { return "negation" }

func (n negation) Set(s string) error {
	if s != "true" {
		return errors.New("it takes no argument")
	}
	return n.of.Value.Set("false")
}

// negations gives every option that is on or off its --no- form.
func negations(fs *pflag.FlagSet) {
	var bools []*pflag.Flag
	fs.VisitAll(func(f *pflag.Flag) {
		if f.Value.Type() == "bool" && !strings.HasPrefix(f.Name, "no-") && f.Name != "help" {
			bools = append(bools, f)
		}
	})
	for _, f := range bools {
		n := fs.VarPF(negation{f}, "no-"+f.Name, "", "")
		n.NoOptDefVal, n.Hidden = "true", true
	}
}
