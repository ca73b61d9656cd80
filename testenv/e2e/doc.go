// Package e2e holds the tests of the real programs on hosts out of namespaces:
// self-checking workloads, python3, a Go server and redis-server are dumped,
// restored and migrated, and say themselves whether anything about them
// changed. They need root, gcc, python3 and redis; "go run ./testenv test"
// installs these.
package e2e
