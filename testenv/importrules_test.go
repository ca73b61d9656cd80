package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// listed is what go list says about a package.
type listed struct {
	ImportPath                         string
	Imports, TestImports, XTestImports []string
	CgoFiles, CFiles                   []string
}

// allowed are the folders that a folder may import; each may import itself.
var allowed = map[string][]string{
	"wire":        {},
	"configs":     {},
	"engine":      {},
	"transport":   {"wire"},
	"agent":       {"engine", "transport", "configs", "wire"},
	"coordinator": {"transport", "configs", "wire"},
	"testenv":     {"engine", "transport", "configs", "wire", "agent", "coordinator"},
}

// layers are the packages inside engine, from the ground up: a package imports
// only what stands below it.
var layers = [][]string{
	{"engine/arch", "engine/sys", "engine/refuse"},
	{"engine/image", "engine/plan", "engine/netlock", "engine/procfs", "engine/ptrace"},
	{"engine/task", "engine/mem", "engine/files", "engine/sockets", "engine/ns", "engine/cgroup"},
	{"engine/freeze", "engine/paging"},
	{"engine/dump", "engine/restore"},
	{"engine"},
}

func layer(pkg string) int {
	for i, l := range layers {
		for _, p := range l {
			if pkg == p || p != "engine" && strings.HasPrefix(pkg, p+"/") {
				return i
			}
		}
	}
	return -1
}

// broken lists what a package does against the import rules.
func broken(p listed) []string {
	const module = "godwit/"
	var bad []string
	pkg, ok := strings.CutPrefix(p.ImportPath, module)
	if !ok {
		return nil
	}
	folder, _, _ := strings.Cut(pkg, "/")
	may, known := allowed[folder]
	if !known {
		return []string{fmt.Sprintf("%s: the top level is fixed and has no %s", pkg, folder)}
	}
	if folder == "engine" && layer(pkg) < 0 {
		bad = append(bad, fmt.Sprintf("%s: has no place in the layers of engine", pkg))
	}
	check := func(imports []string, test bool) {
		for _, imp := range imports {
			if imp == "unsafe" && folder == "engine" && pkg != "engine/sys" && !test {
				bad = append(bad, fmt.Sprintf("%s: only engine/sys may import unsafe", pkg))
			}
			of, ok := strings.CutPrefix(imp, module)
			if !ok {
				continue
			}
			to, _, _ := strings.Cut(of, "/")
			switch {
			case to == "testenv" && folder != "testenv" && test:
			case to != folder && !slices.Contains(may, to):
				bad = append(bad, fmt.Sprintf("%s: must not import %s", pkg, of))
			case folder == "engine" && to == "engine" && layer(pkg) >= 0 && layer(of) > layer(pkg):
				bad = append(bad, fmt.Sprintf("%s: must not import %s, which stands above it", pkg, of))
			}
		}
	}
	check(p.Imports, false)
	check(p.TestImports, true)
	check(p.XTestImports, true)
	if len(p.CgoFiles)+len(p.CFiles) > 0 {
		bad = append(bad, fmt.Sprintf("%s: holds cgo or C files", pkg))
	}
	return bad
}

func TestImportRules(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-e", "-json=ImportPath,Imports,TestImports,XTestImports,CgoFiles,CFiles", "godwit/...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	n := 0
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; n++ {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		for _, b := range broken(p) {
			t.Error(b)
		}
	}
	if n < 10 {
		t.Errorf("go list named %d packages only", n)
	}
}

func TestBroken(t *testing.T) {
	for _, tc := range []struct {
		name string
		p    listed
		want []string
	}{
		{"allowed", listed{ImportPath: "godwit/agent", Imports: []string{"godwit/engine", "os"}}, nil},
		{"coordinator and engine", listed{ImportPath: "godwit/coordinator", Imports: []string{"godwit/engine/plan"}}, []string{"coordinator: must not import engine/plan"}},
		{"in a test too", listed{ImportPath: "godwit/wire", XTestImports: []string{"godwit/transport"}}, []string{"wire: must not import transport"}},
		{"testenv in a test", listed{ImportPath: "godwit/engine", TestImports: []string{"godwit/testenv/hosts"}}, nil},
		{"testenv in the product", listed{ImportPath: "godwit/engine", Imports: []string{"godwit/testenv/hosts"}}, []string{"engine: must not import testenv/hosts"}},
		{"upwards", listed{ImportPath: "godwit/engine/sys", Imports: []string{"godwit/engine/task"}}, []string{"engine/sys: must not import engine/task, which stands above it"}},
		{"no layer", listed{ImportPath: "godwit/engine/util"}, []string{"engine/util: has no place in the layers of engine"}},
		{"new folder", listed{ImportPath: "godwit/internal/x"}, []string{"internal/x: the top level is fixed and has no internal"}},
		{"unsafe", listed{ImportPath: "godwit/engine/mem", Imports: []string{"unsafe"}}, []string{"engine/mem: only engine/sys may import unsafe"}},
		{"cgo", listed{ImportPath: "godwit/wire", CgoFiles: []string{"x.go"}}, []string{"wire: holds cgo or C files"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, broken(tc.p)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
