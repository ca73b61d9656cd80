package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"godwit/engine"
)

func testEntry(id string) entry {
	return entry{
		Version: journalVersion, Role: "source", ID: id, Peer: "beta", Pid: 17, Boot: "b", Agent: engine.Held{Pid: 3, Start: 4},
		Tree: []engine.Held{{Pid: 17, Start: 1 << 60}, {Pid: 18, Start: 9, Own: true}}, FrozenUnixUs: 1234567,
	}
}

func TestJournal(t *testing.T) {
	j := &journal{dir: filepath.Join(t.TempDir(), "not", "there")}
	if list, err := j.load(); err != nil || len(list) != 0 {
		t.Fatalf("an empty journal has %v (%v)", list, err)
	}
	want := []*entry{}
	for _, id := range []string{"a", "b/../c"} { // an id comes over the bus
		e := testEntry(id)
		noErr(t, j.put(&e))
		e.Ran = true
		noErr(t, j.put(&e))
		want = append(want, &e)
	}
	got, err := j.load()
	noErr(t, err)
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	noErr(t, j.drop("source", "a"))
	noErr(t, j.drop("source", "a"))

	// What was being written when the power went, and what was damaged.
	noErr(t, os.WriteFile(filepath.Join(j.dir, "source-x.journal.new"), []byte("{"), 0o600))
	e := testEntry("torn")
	b, err := e.encode()
	noErr(t, err)
	noErr(t, os.WriteFile(j.path("source", "torn"), b[:len(b)/2], 0o600))
	got, err = j.load()
	if len(got) != 1 || err == nil || !strings.Contains(err.Error(), "source-torn.journal: it is torn or damaged") {
		t.Errorf("of a damaged journal came %d entries, %v", len(got), err)
	}
}

func TestJournalFullDisk(t *testing.T) {
	j := &journal{dir: "/dev/full"}
	e := testEntry("a")
	if err := j.put(&e); err == nil || !strings.Contains(err.Error(), "note migration a in the journal") {
		t.Errorf("the error is %v", err)
	}
}

func FuzzJournalEntry(f *testing.F) {
	e := testEntry("a")
	b, err := e.encode()
	noErr(f, err)
	f.Add(b)
	f.Add([]byte("{}\n00000000\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decodeEntry(b)
		if err != nil {
			return
		}
		again, err := e.encode()
		noErr(t, err)
		if e2, err := decodeEntry(again); err != nil || !cmp.Equal(e, e2) {
			t.Errorf("%+v became %+v (%v)", e, e2, err)
		}
	})
}
