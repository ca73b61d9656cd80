package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/setup"
)

// endToEnd is the package whose tests measure times, so nothing else may run
// beside them.
const endToEnd = "godwit/testenv/e2e"

// test installs what is missing and runs go test. Its error is go test's own
// *exec.ExitError if tests failed.
func test(ctx context.Context, args []string) error {
	if os.Geteuid() != 0 {
		return errors.New("the tests trace processes and make namespaces: run them as root")
	}
	if err := setup.Ensure(ctx, os.Stdout, slices.Concat(setup.Hosts, setup.Workloads)); err != nil {
		return err
	}
	flags, packages := split(args)
	if !slices.ContainsFunc(flags, func(a string) bool {
		return strings.HasPrefix(a, "-timeout") || strings.HasPrefix(a, "--timeout")
	}) {
		flags = append(flags, "-timeout=60m")
	}
	if len(packages) > 0 {
		return goTest(ctx, flags, packages)
	}
	out, err := exec.CommandContext(ctx, "go", "list", "./...").Output()
	if err != nil {
		return fmt.Errorf("list packages: %w", err)
	}
	packages = slices.DeleteFunc(strings.Fields(string(out)), func(p string) bool { return p == endToEnd })
	first := goTest(ctx, flags, packages)
	if ctx.Err() != nil {
		return first
	}
	return errors.Join(first, goTest(ctx, flags, []string{endToEnd}))
}

// split separates package patterns from the other arguments of go test. An
// argument after -args belongs to the tests, one after a flag without "=" to it.
func split(args []string) (flags, packages []string) {
	for i, a := range args {
		switch {
		case a == "-args" || a == "--args":
			return append(flags, args[i:]...), packages
		case strings.HasPrefix(a, "./") || a == "." || strings.HasPrefix(a, "godwit/"):
			packages = append(packages, a)
		default:
			flags = append(flags, a)
		}
	}
	return flags, packages
}

// goTest runs go test on the packages and lets its output through.
func goTest(ctx context.Context, flags, packages []string) error {
	// Go would reuse results of end-to-end tests although the programs that
	// they build and run have changed.
	args := []string{"test", "-count=1"}
	if i := slices.IndexFunc(flags, func(a string) bool { return a == "-args" || a == "--args" }); i >= 0 {
		args = slices.Concat(args, flags[:i], packages, flags[i:])
	} else {
		args = slices.Concat(args, flags, packages)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// Ctrl-C reaches go test by itself; SIGTERM is handed on.
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGINT) }
	cmd.WaitDelay = 30 * time.Second
	return cmd.Run()
}
