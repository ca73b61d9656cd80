// Command testenv runs the tests, the benchmarks and the demo. It needs root and installs by
// itself what is missing.
//
//	go run ./testenv demo [--keep]
//	go run ./testenv test [go test arguments]
//	go run ./testenv bench [--json] [--quick] [names]
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"

	"golang.org/x/sys/unix"
)

const usage = `usage:
  go run ./testenv demo [--keep] [--memory MIB]
      moves a process tree with a talking client, a fifo and a log between two
      hosts made of namespaces, and says what happened; --keep leaves them
      there to look around until Ctrl-C
  go run ./testenv test [go test arguments]
      installs what the tests need and runs all of them, or those of the
      packages that the arguments name
  go run ./testenv bench [--json] [--quick] [names]
      moves trees of many kinds, or those named, by each mode and measures
      that; --quick with a quarter of the memory (docs/benchmarks.md)

All need root. Exit codes: 0 done; 1 failed; 2 usage.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM, unix.SIGHUP)
	err := run(ctx, os.Args[1:])
	stop()
	var ee *exec.ExitError
	switch {
	case err == nil:
	case errors.Is(err, errUsage):
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	case errors.As(err, &ee) && ee.ExitCode() > 0:
		os.Exit(ee.ExitCode()) // go test has said why
	default:
		fmt.Fprintf(os.Stderr, "testenv: %v\n", err)
		os.Exit(1)
	}
}

var errUsage = errors.New("usage")

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errUsage
	}
	switch args[0] {
	case "demo":
		return demo(ctx, args[1:])
	case "test":
		return test(ctx, args[1:])
	case "bench":
		return bench(ctx, args[1:])
	}
	return errUsage
}
