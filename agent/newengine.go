package agent

import (
	"github.com/hashicorp/go-hclog"

	"godwit/engine"
)

func newEngine(log hclog.Logger) Engine { return any(engine.New(log)).(Engine) }
