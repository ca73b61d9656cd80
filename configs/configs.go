// Package configs owns the configuration of agent and coordinator: its keys,
// defaults, sources and validation, the sample files and the systemd units. It
// imports nothing else of this module and must not know what a value is used
// for beyond what makes it valid.
//
// A value comes from the first of these that gives it: a command-line flag, an
// environment variable, the file, the default. The environment variable of key
// limits.window is GODWIT_AGENT_LIMITS_WINDOW for the agent; that of key
// serve.listen is GODWIT_SERVE_LISTEN for the coordinator. Lists are separated
// by commas there.
package configs

import (
	"os"
	"path/filepath"
)

// Default files; it is fine if they do not exist.
const (
	AgentFile       = "/etc/godwit/agent.toml"
	CoordinatorFile = "/etc/godwit/godwit.toml"
)

// Prefixes of environment variables. The coordinator's ignores what starts
// with the agent's.
const (
	agentEnv       = "GODWIT_AGENT_"
	coordinatorEnv = "GODWIT_"
)

// Agent is the configuration of an agent.
type Agent struct {
	// Host is this host's name on the bus: letters, digits, "-", "_"; unique.
	// Empty: the kernel's host name (HostName).
	Host string `toml:"host"`
	// StateDir is the directory of what outlives the agent's process.
	StateDir string `toml:"state_dir"`
	// GhostLimit is the largest deleted file that travels with its data.
	GhostLimit Size     `toml:"ghost_limit"`
	NATS       NATS     `toml:"nats"`
	Direct     Direct   `toml:"direct"`
	Limits     Limits   `toml:"limits"`
	Timeouts   Timeouts `toml:"timeouts"`
	Log        Log      `toml:"log"`
	// External are rules about open files of trees that land here.
	External []External `toml:"external"`
}

// NATS says how the bus is reached and who we are there. At most one of
// NKeyFile, CredsFile and User is set.
type NATS struct {
	// URLs of the servers, tried in turn: nats://, tls://, ws:// or wss://.
	URLs []string `toml:"urls"`
	// NKeyFile holds the seed of an nkey, as "godwit serve" makes it.
	NKeyFile string `toml:"nkey_file"`
	// CredsFile holds a JWT and a seed, as nsc makes it.
	CredsFile string `toml:"creds_file"`
	// User and the file of the password; one line.
	User         string `toml:"user"`
	PasswordFile string `toml:"password_file"`
	TLS          TLS    `toml:"tls"`
}

// TLS are PEM files; CA empty means the system's, Cert and Key empty means no
// client certificate.
type TLS struct {
	CA   string `toml:"ca"`
	Cert string `toml:"cert"`
	Key  string `toml:"key"`
}

// Direct is the agent's own server, from which destinations fetch the streams of trees
// that leave this host.
type Direct struct {
	Enabled bool `toml:"enabled"`
	// Listen is host:port; 0.0.0.0 is every IPv4 address, [::] every address.
	Listen string `toml:"listen"`
	// Advertise are this host's addresses for others, host or host:port; empty: those
	// of its network interfaces.
	Advertise []string `toml:"advertise"`
}

// Limits bound what a migration takes of the host and of the network.
type Limits struct {
	// Outgoing and Incoming are how many trees may leave, and land on, the host at a
	// time; others wait.
	Outgoing int `toml:"outgoing"`
	Incoming int `toml:"incoming"`
	// Window is how much of a stream may be under way unacknowledged; the
	// agent holds about twice as much in memory.
	Window Size `toml:"window"`
	// Chunk is the largest message of a stream.
	Chunk Size `toml:"chunk"`
	// Lanes is how many connections a stream uses.
	Lanes int `toml:"lanes"`
	// MemoryLimit is what the garbage collector aims to stay below.
	MemoryLimit Size `toml:"memory_limit"`
	// Bandwidth caps a stream; 0: no cap. A migration may ask for less.
	Bandwidth Rate `toml:"bandwidth"`
}

// Timeouts end what does not get on. None may be zero.
type Timeouts struct {
	// Freeze bounds the stopping of all tasks of a tree.
	Freeze Duration `toml:"freeze"`
	// Frozen bounds the time from the first stopped task to the commit, for
	// migrations that do not say it themselves.
	Frozen Duration `toml:"frozen"`
	// Idle is how long the other end of a stream may be silent.
	Idle Duration `toml:"idle"`
	// Prepared is how long a destination waits for the stream to begin.
	Prepared Duration `toml:"prepared"`
}

// Log says what is logged and how, on standard error.
type Log struct {
	// Level is trace, debug, info, warn or error.
	Level string `toml:"level"`
	// Format is text or json.
	Format string `toml:"format"`
}

// Coordinator is the configuration of the godwit command.
type Coordinator struct {
	// NATS without URLs: "serve" runs the bus itself, and the other commands
	// look for that one (Serve.Listen).
	NATS  NATS  `toml:"nats"`
	Serve Serve `toml:"serve"`
	Log   Log   `toml:"log"`
}

// Serve configures the bus that "godwit serve" runs.
type Serve struct {
	// Listen is its address, host:port. Any host that is not a loopback
	// address makes it demand credentials.
	Listen string `toml:"listen"`
	// StoreDir keeps the records of migrations, and credentials.
	StoreDir string `toml:"store_dir"`
}

// DefaultAgent returns the defaults of an agent.
func DefaultAgent() *Agent {
	return &Agent{
		StateDir:   "/var/lib/godwit-agent",
		GhostLimit: 1 << 30,
		NATS:       NATS{URLs: []string{"nats://127.0.0.1:4222"}},
		Direct:     Direct{Enabled: true, Listen: "0.0.0.0:4223", Advertise: []string{}},
		Limits:     Limits{Outgoing: 4, Incoming: 4, Window: 8 << 20, Chunk: 512 << 10, Lanes: 2, MemoryLimit: 96 << 20},
		Timeouts: Timeouts{
			Freeze: 10 * second, Frozen: 120 * second, Idle: 15 * second, Prepared: 30 * second,
		},
		Log: Log{Level: "info", Format: "text"},
	}
}

// DefaultCoordinator returns the defaults of the godwit command.
func DefaultCoordinator() *Coordinator {
	return &Coordinator{
		NATS:  NATS{URLs: []string{}},
		Serve: Serve{Listen: "127.0.0.1:4222", StoreDir: "/var/lib/godwit"},
		Log:   Log{Level: "info", Format: "text"},
	}
}

// Override is a value from the command line.
type Override struct {
	Key   string // as in the file: "limits.window"
	Value string // as in an environment variable
	Flag  string // its name for messages: "--window"
}

// LoadAgent returns the configuration of an agent. path is the file; empty
// means the variable GODWIT_AGENT_CONFIG or else AgentFile, of which only the
// latter may be missing. env is as os.Environ gives it. An error that is about
// values is an *Error and names all of them.
func LoadAgent(path string, env []string, overrides ...Override) (*Agent, error) {
	c := DefaultAgent()
	l := newLoader(c, agentEnv, "")
	if err := l.load(path, AgentFile, env, overrides); err != nil {
		return nil, err
	}
	c.validate(l)
	if err := l.err(); err != nil {
		return nil, err
	}
	return c, nil
}

// LoadCoordinator returns the configuration of the godwit command; as
// LoadAgent, with GODWIT_CONFIG and CoordinatorFile.
func LoadCoordinator(path string, env []string, overrides ...Override) (*Coordinator, error) {
	c := DefaultCoordinator()
	l := newLoader(c, coordinatorEnv, agentEnv)
	if err := l.load(path, CoordinatorFile, env, overrides); err != nil {
		return nil, err
	}
	c.validate(l)
	if err := l.err(); err != nil {
		return nil, err
	}
	return c, nil
}

// HostName is Host or, if that is empty, the kernel's host name with each
// character that a name on the bus cannot have replaced by "-".
func (c *Agent) HostName() (string, error) {
	if c.Host != "" {
		return c.Host, nil
	}
	name, err := os.Hostname()
	if err != nil {
		return "", err
	}
	return busName(name), nil
}

// StatePath is the path of a file in the agent's state directory.
func (c *Agent) StatePath(name string) string { return filepath.Join(c.StateDir, name) }
