// Command godwit is the operator's tool: it serves the control plane and moves
// running process trees between hosts.
package main

import (
	"os"

	"godwit/coordinator"
)

func main() {
	os.Exit(coordinator.Main(os.Args[1:], os.Stdout, os.Stderr))
}
