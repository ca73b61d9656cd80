package engine_test

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"godwit/engine/dump"
	"godwit/engine/files"
	"godwit/engine/mem"
	"godwit/engine/plan"
)

//go:generate go test -count=1 -run ^TestSupportFile$ -update .

var update = flag.Bool("update", false, "write docs/support.md in place of comparing it")

const supportFile = "../docs/support.md"

// TestSupportFile fails when the list of what is carried is not that of the code.
func TestSupportFile(t *testing.T) {
	want := supportText(t)
	if *update {
		if err := os.WriteFile(supportFile, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	got, err := os.ReadFile(supportFile)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("docs/support.md is not current, run go generate ./engine (-want +got):\n%s", diff)
	}
}

func supportText(t *testing.T) string {
	var b strings.Builder
	b.WriteString(`# What is carried and what is refused

Made from the code by ` + "`go generate ./engine`" + `; a test fails when it is not current. What is refused is refused before the
tree is touched, with the process, the descriptor or mapping, the reason and a hint.
`)
	inFiles := refusals(t, "files", "d")
	kindFile := kindFiles(t)
	section(&b, "Open files", files.Support())
	b.WriteString("\nOf what is carried, these states are refused (… stands for a number, a name or a path):\n\n")
	named := map[string]bool{}
	for _, s := range files.Support() {
		if f := kindFile[s.Kind]; f != "" {
			list(&b, s.Kind, inFiles[f])
			named[f] = true
		}
	}
	for _, f := range sortedKeys(inFiles) {
		if !named[f] {
			list(&b, "others ("+strings.TrimSuffix(f, ".go")+")", inFiles[f])
		}
	}
	section(&b, "Memory", mem.Support())
	section(&b, "Processes and threads", dump.Support())
	b.WriteString("\nRefused is a process, or a thread, that:\n\n")
	inDump := refusals(t, "dump", "c")
	for _, f := range sortedKeys(inDump) {
		for _, r := range inDump[f] {
			if !strings.HasPrefix(r, "is …") { // a mapping: see above
				fmt.Fprintf(&b, "- %s\n", r)
			}
		}
	}
	return b.String()
}

func section(b *strings.Builder, title string, rows []plan.Support) {
	fmt.Fprintf(b, "\n## %s\n\n| what | | |\n|---|---|---|\n", title)
	for _, s := range rows {
		state := "carried"
		switch {
		case s.Refused:
			state = "refused"
		case s.With != "":
			state = "with " + s.With
		}
		fmt.Fprintf(b, "| %s | %s | %s |\n", s.Kind, state, s.Note)
	}
}

func list(b *strings.Builder, what string, reasons []string) {
	if len(reasons) > 0 {
		fmt.Fprintf(b, "- %s: %s\n", what, strings.Join(reasons, "; "))
	}
}

func sortedKeys(m map[string][]string) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// sources parses a package below this one, without its tests.
func sources(t *testing.T, pkg string) map[string]*ast.File {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(pkg, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]*ast.File{}
	for _, n := range names {
		if strings.HasSuffix(n, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), n, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		out[filepath.Base(n)] = f
	}
	if len(out) == 0 {
		t.Fatalf("package %s has no sources", pkg)
	}
	return out
}

// refusals gives, for each source file of a package, the reasons with which its
// type of receiver recv refuses something. Those of a method named refuse… are of the
// files that call it, too.
func refusals(t *testing.T, pkg, recv string) map[string][]string {
	// refuse(object, reason, hint), or lacks, or passes, and refuse(process, path, reason, hint).
	at := map[string]int{"d": 1, "c": 2}[recv]
	reasons, users := map[string][]string{}, map[string][]string{} // by file or method
	kindFile := kindFiles(t)
	home := map[string]string{} // of a method: its file, if that has a kind of open file
	total := 0
	for name, f := range sources(t, pkg) {
		for _, decl := range f.Decls {
			user := name
			if fn, ok := decl.(*ast.FuncDecl); ok && fn.Recv != nil && isRefusal(fn.Name.Name) {
				user = fn.Name.Name
				for _, f := range kindFile {
					if f == name {
						home[user] = name
					}
				}
			}
			ast.Inspect(decl, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				sel, ok := call.Fun.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				if x, ok := sel.X.(*ast.Ident); !ok || x.Name != recv {
					return true
				}
				switch called := sel.Sel.Name; {
				case isRefusal(called) && called != user:
					users[called] = append(users[called], user)
				case (slices.Contains([]string{"refuse", "lacks", "passes"}, called)) && len(call.Args) > at:
					if r := reason(call.Args[at]); strings.Trim(r, "… ") != "" {
						reasons[user] = append(reasons[user], r)
						total++
					}
				}
				return true
			})
		}
	}
	if total == 0 {
		t.Fatalf("no refusal was found in package %s: does it still call %s.refuse?", pkg, recv)
	}
	out := map[string][]string{}
	for _, user := range sortedKeys(reasons) {
		names := filesOf(user, users, map[string]bool{})
		if h := home[user]; h != "" {
			names = append(names, h)
		}
		for _, name := range names {
			for _, r := range reasons[user] {
				if !slices.Contains(out[name], r) {
					out[name] = append(out[name], r)
				}
			}
		}
	}
	return out
}

func isRefusal(method string) bool {
	return strings.HasPrefix(method, "refuse") && method != "refuse"
}

// filesOf gives the files that use a method, by other methods perhaps.
func filesOf(user string, users map[string][]string, seen map[string]bool) []string {
	if strings.HasSuffix(user, ".go") {
		return []string{user}
	}
	if seen[user] {
		return nil
	}
	seen[user] = true
	var out []string
	for _, u := range users[user] {
		out = append(out, filesOf(u, users, seen)...)
	}
	return out
}

// reason is the text of an expression, with … for what only a run tells.
func reason(e ast.Expr) string {
	s := text(e)
	for _, verb := range []string{"%d", "%s", "%q", "%v", "%#x", "%#o"} {
		s = strings.ReplaceAll(s, verb, "…")
	}
	return strings.TrimSpace(strings.TrimPrefix(s, "…"))
}

func text(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		if s, err := strconv.Unquote(e.Value); err == nil {
			return s
		}
	case *ast.BinaryExpr:
		return text(e.X) + text(e.Y)
	case *ast.CallExpr:
		if len(e.Args) > 0 {
			return text(e.Args[0]) // fmt.Sprintf
		}
	}
	return "…"
}

// kindFiles says which file has which kind of open file: its declaration has a
// field name.
func kindFiles(t *testing.T) map[string]string {
	out := map[string]string{}
	for name, f := range sources(t, "files") {
		ast.Inspect(f, func(n ast.Node) bool {
			kv, ok := n.(*ast.KeyValueExpr)
			if !ok {
				return true
			}
			if k, ok := kv.Key.(*ast.Ident); ok && k.Name == "name" {
				if s := text(kv.Value); s != "…" && out[s] == "" {
					out[s] = name
				}
			}
			return true
		})
	}
	for _, s := range files.Support() {
		// Those with a note of their own may be states of several kinds.
		if !s.Refused && s.With == "" && s.Note == "" && out[s.Kind] == "" {
			t.Errorf("no source file declares the kind %q of open files", s.Kind)
		}
	}
	return out
}
