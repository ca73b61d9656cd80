package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("this test needs root")
	}
	t.Skip("this test needs root")
}

// watched is what the demo prints; the test may read along.
type watched struct {
	mu sync.Mutex
	b  bytes.Buffer
	on func(string)
}

func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.on != nil {
		w.on(string(p))
	}
	return w.b.Write(p)
}

func (w *watched) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.String()
}

// leftovers are processes whose program is one that this demo built.
func leftovers(t *testing.T) []string {
	t.Helper()
	exes, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, e := range exes {
		if to, err := os.Readlink(e); err == nil && strings.HasPrefix(to, demoBase+"/godwit-demo-") {
			left = append(left, e+" -> "+to)
		}
	}
	return left
}

func TestDemo(t *testing.T) {
	needRoot(t)
	var err error
	if demoBase, err = os.MkdirTemp("/var/tmp", "gwdemo"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(demoBase) })
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	t.Run("to its end", func(t *testing.T) {
		w := &watched{}
		if err := runDemo(ctx, w, 32, false); err != nil {
			t.Fatalf("%v\n%s", err, w)
		}
		for _, want := range []string{"moved from alpha to beta", "frozen for ", "errors     0"} {
			if !strings.Contains(w.String(), want) {
				t.Errorf("the demo does not say %q:\n%s", want, w)
			}
		}
	})
	// An interrupt in the middle of the migration leaves nothing behind either.
	t.Run("interrupted", func(t *testing.T) {
		ctx, interrupt := context.WithCancel(ctx)
		defer interrupt()
		w := &watched{on: func(s string) {
			if strings.Contains(s, "── godwit migrate") {
				time.AfterFunc(150*time.Millisecond, interrupt)
			}
		}}
		if err := runDemo(ctx, w, 128, true); err == nil || err.Error() != "interrupted" {
			t.Errorf("an interrupted demo ends with %v:\n%s", err, w)
		}
	})
	for range 6000 { // the kernel may still be busy with the last of them
		if len(leftovers(t)) == 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if left := leftovers(t); len(left) > 0 {
		t.Errorf("still running: %v", left)
	}
	if dirs, err := filepath.Glob(demoBase + "/godwit-demo-*"); err != nil || len(dirs) > 0 {
		t.Errorf("left behind: %v, %v", dirs, err)
	}
}
