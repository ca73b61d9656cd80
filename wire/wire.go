// Package wire owns the messages that coordinators and agents exchange, and
// their version. It must not know what any of them causes.
package wire

//go:generate protoc --go_out=. --go_opt=paths=source_relative godwit.proto

// Version is the protocol version that this build speaks. A party that
// receives another version answers CODE_VERSION and does nothing.
const Version = 1
