// Command godwit-agent is the daemon of a host and, on the local machine, the
// engine's command line.
package main

import (
	"os"

	"godwit/agent"
)

func main() { os.Exit(agent.Main(os.Args[1:], os.Stdout, os.Stderr)) }
