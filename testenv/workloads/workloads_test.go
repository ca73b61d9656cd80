package workloads

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"godwit/testenv/hosts"
)

// TestStandAlone runs every workload undisturbed: a program that complains
// about a machine that nobody touched proves nothing later.
func TestStandAlone(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test needs root")
		}
		t.Skip("this test needs root")
	}
	e := hosts.ForTest(t, "alpha")
	h := e.Host("alpha")
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	p, err := Build(ctx, e.Dir())
	if err != nil {
		t.Fatal(err)
	}
	cmds, err := p.Commands(ctx)
	if err != nil {
		t.Fatal(err)
	}
	type job struct {
		name string
		argv func(prefix string) []string
	}
	var jobs []job
	for _, c := range cmds {
		if slices.Contains(notAlone, c) {
			continue
		}
		jobs = append(jobs, job{c, func(prefix string) []string { return []string{p.Selfcheck, c, prefix} }})
	}
	for _, k := range Refused {
		jobs = append(jobs, job{"hold-" + k, func(prefix string) []string { return []string{p.Selfcheck, "hold", prefix, k} }})
	}
	jobs = append(jobs,
		job{"creds-root", func(prefix string) []string { return []string{p.Selfcheck, "creds", prefix, "root"} }},
		job{"heart", func(prefix string) []string {
			return []string{p.Selfcheck, "heart", prefix, p.Selfcheck, "dirtier", prefix + "-child", "8", "10"}
		}},
		job{"dirtier-busy", func(prefix string) []string {
			return []string{p.Selfcheck, "dirtier", prefix, "16", "20", "8", "50", "2"}
		}},
		job{"mem-busy", func(prefix string) []string { return []string{p.Selfcheck, "mem", prefix, "16", "5000"} }},
		job{"pycheck", func(prefix string) []string { return []string{"/usr/bin/python3", p.Pycheck, prefix, "16"} }},
		job{"gocheck", func(prefix string) []string { return []string{p.Gocheck, prefix, "127.0.0.1:8099", "16"} }},
	)
	for group := range slices.Chunk(jobs, 8) {
		var runs []*Run
		for _, j := range group {
			prefix := filepath.Join(e.Dir(), "w", j.name)
			r, err := Start(ctx, h, prefix, j.argv(prefix)...)
			if err != nil {
				t.Error(err)
				continue
			}
			runs = append(runs, r)
		}
		for _, r := range runs {
			if err := r.Goes(ctx, 30); err != nil {
				t.Error(err)
			}
		}
		for _, r := range runs {
			if err := r.Stop(ctx); err != nil {
				t.Error(err)
			}
		}
	}
}

// notAlone are commands of selfcheck that want arguments, a partner, a terminal or a dump.
var notAlone = []string{
	"container", "execed", "external", "heart", "hold", "manyfds", "netns", "numbered", "proxyfeed", "proxywork", "rehomed", "sharing", "shelljob", "sigsender",
	"sigtarget", "tcpclose", "tcpflight", "tcpout", "tcppeer", "unixbusy", "unixlogger", "unixpeer", "unixserver", "userns",
}

func TestCheckRecords(t *testing.T) {
	for _, tc := range []struct {
		name, log, want string
		gap             time.Duration
	}{
		{"empty", "", "", 0},
		{"whole", "0 10\n1 20\n2 50\n", "", 30},
		{"unfinished", "0 10\n1 2", "", 0},
		{"lost", "0 10\n2 20\n", "record 1 carries number 2: records were lost or doubled", 10},
		{"doubled", "0 10\n1 20\n1 20\n", "record 2 carries number 1: records were lost or doubled", 10},
		{"back in time", "0 10\n1 5\n", "record 1 is 5ns older than the one before it", 0},
		{"torn", "0 10\n1\n", `record 1: "1\n" has no time`, 0},
		{"not a number", "x 10\n", `record 0: strconv.ParseUint: parsing "x": invalid syntax`, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			rs, err := ParseRecords([]byte(tc.log))
			if err == nil {
				err = CheckRecords(rs)
			}
			got := ""
			if err != nil {
				got = err.Error()
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			if gap := MaxGap(rs); gap != tc.gap {
				t.Errorf("gap %v, want %v", gap, tc.gap)
			}
		})
	}
}

func FuzzParseRecords(f *testing.F) {
	for _, s := range []string{"", "0 1\n1 2\n", "0", "0 x\n", "18446744073709551616 1\n", "\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		rs, err := ParseRecords(b)
		if err != nil {
			return
		}
		var again strings.Builder
		for _, r := range rs {
			_, _ = fmt.Fprintf(&again, "%d %d\n", r.N, int64(r.At))
		}
		rs2, err := ParseRecords([]byte(again.String()))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(rs, rs2); diff != "" {
			t.Errorf("second reading differs:\n%s", diff)
		}
	})
}
