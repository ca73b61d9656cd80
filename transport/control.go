package transport

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"godwit/wire"
)

const (
	// serviceName is the name of all agents for NATS's service discovery
	// ($SRV.INFO.godwit-agent).
	serviceName = "godwit-agent"
	// callTimeout is how long Call waits if its context has no deadline.
	callTimeout = 10 * time.Second
	// discoverQuiet ends a discovery so long after the last answer.
	discoverQuiet = 250 * time.Millisecond
	// timeoutHeader tells the handler how long the caller waits, in ms.
	timeoutHeader = "Godwit-Timeout-Ms"
	// methodInfo is asked by Discover.
	methodInfo = "info"
)

var (
	// ErrNoAgent: nothing on the bus answers for that host.
	ErrNoAgent = errors.New("no agent")
	// ErrNoAnswer: the agent is there, but did not answer in time.
	ErrNoAnswer = errors.New("no answer in time")
	// ErrDisconnected: this side is cut off from the bus.
	ErrDisconnected = errors.New("not connected to the bus")
	// ErrDuplicateHost: another agent with the same host name is on the bus.
	ErrDuplicateHost = errors.New("another agent has the same host name")
)

// ServiceConfig describes an agent to the bus.
type ServiceConfig struct {
	// Info is what Discover shows of an agent that does not answer "info";
	// host, protocol and version must be set. The host is a name (CheckName).
	Info *wire.AgentInfo
	// Concurrency bounds the calls of one method that run at a time; 0 means 8.
	Concurrency int
	Logger      hclog.Logger
}

// Service answers control calls for one host.
type Service struct {
	nc     *nats.Conn
	svc    micro.Service
	host   string
	conc   int
	log    hclog.Logger
	ctx    context.Context // ends with Stop: calls in flight are told
	cancel context.CancelFunc
	calls  sync.WaitGroup
}

var semver = regexp.MustCompile(`^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?$`)

// Serve registers the agent of a host on the bus. It fails with
// ErrDuplicateHost if another agent there has the same host name: two of them
// would share the calls at random. Methods are added by Handle.
func Serve(nc *nats.Conn, cfg ServiceConfig) (*Service, error) {
	host := cfg.Info.GetHost()
	if err := CheckName(host); err != nil {
		return nil, fmt.Errorf("register the agent: host: %w", err)
	}
	if err := noTwin(nc, host, ""); err != nil {
		return nil, err
	}
	info, err := protojson.Marshal(cfg.Info)
	if err != nil {
		return nil, fmt.Errorf("register agent %s: %w", host, err)
	}
	version := strings.TrimPrefix(cfg.Info.Version, "v")
	if !semver.MatchString(version) {
		version = "0.0.0" // micro insists on the form; the real one is in info
	}
	log := logger(cfg.Logger).With("host", host)
	svc, err := micro.AddService(nc, micro.Config{
		Name:        serviceName,
		Version:     version,
		Description: "moves process trees from and to " + host,
		Metadata: map[string]string{
			"host":     host,
			"protocol": strconv.FormatUint(uint64(cfg.Info.Protocol), 10),
			"version":  cfg.Info.Version,
			"info":     string(info),
		},
		ErrorHandler: func(_ micro.Service, err *micro.NATSError) {
			log.Warn("control subscription", "subject", err.Subject, "error", err.Description)
		},
	})
	if err != nil {
		return nil, fmt.Errorf("register agent %s: %w", host, err)
	}
	// Both of two agents that start in the same moment may have seen nobody
	// before they registered; at least the later of them sees the other now.
	if err := noTwin(nc, host, svc.Info().ID); err != nil {
		return nil, errors.Join(err, svc.Stop())
	}
	s := &Service{nc: nc, svc: svc, host: host, conc: cfg.Concurrency, log: log}
	if s.conc <= 0 {
		s.conc = 8
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

// noTwin looks for an agent of that host with another service id.
func noTwin(nc *nats.Conn, host, self string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	infos, err := services(ctx, nc)
	if err != nil {
		return fmt.Errorf("register agent %s: look for another of that name: %w", host, err)
	}
	for _, i := range infos {
		if i.Metadata["host"] == host && i.ID != self {
			return fmt.Errorf("register agent %s: %w (service %s): stop it or choose another host name", host, ErrDuplicateHost, i.ID)
		}
	}
	return nil
}

// Stop takes the agent off the bus, ends the contexts of calls in flight and
// waits for their handlers.
func (s *Service) Stop() error {
	err := s.svc.Stop()
	s.cancel()
	s.calls.Wait()
	if err == nil {
		// The service takes its subscriptions back without waiting for the
		// server; whoever starts next must not find this one still there.
		err = flush(context.Background(), s.nc)
	}
	if errors.Is(err, nats.ErrConnectionClosed) || errors.Is(err, nats.ErrConnectionReconnecting) {
		return nil // gone from the bus all the same
	}
	if err != nil {
		return fmt.Errorf("take agent %s off the bus: %w", s.host, err)
	}
	return nil
}

// Handle lets fn answer the calls of one method. Several calls run at once, up
// to ServiceConfig.Concurrency. The context ends with the time that the caller
// waits or with Stop. An error travels in the reply's field "error", with the
// host; fn may return a reply beside it. A panic of fn is an error of the call
// and is logged.
//
// Preconditions: Resp is a message with a field "error" of type wire.Error.
func Handle[Req, Resp proto.Message](s *Service, method string, fn func(context.Context, Req) (Resp, error)) error {
	if err := CheckName(method); err != nil {
		return fmt.Errorf("serve %s: %w", method, err)
	}
	if errorField(newOf[Resp]()) == nil {
		return fmt.Errorf("serve %s: %T has no field \"error\"", method, newOf[Resp]())
	}
	slots := make(chan struct{}, s.conc)
	subject := agentSubject(s.host, method)
	handler := micro.HandlerFunc(func(r micro.Request) {
		// The subscription's goroutine waits for a slot, so further calls stay
		// in its bounded queue.
		select {
		case slots <- struct{}{}:
		case <-s.ctx.Done():
			return
		}
		s.calls.Add(1)
		go func() {
			defer s.calls.Done()
			defer func() { <-slots }()
			s.answer(r, method, newOf[Resp](), func(ctx context.Context) (proto.Message, error) {
				req := newOf[Req]()
				body, err := unpack(r.Data(), r.Headers().Get(encodingHeader))
				if err == nil {
					err = proto.Unmarshal(body, req)
				}
				if err != nil {
					return nil, wire.Errorf(wire.Code_CODE_INVALID, "read the request %s: %w", method, err)
				}
				resp, err := fn(ctx, req)
				if !resp.ProtoReflect().IsValid() {
					return nil, err
				}
				return resp, err
			})
		}()
	})
	err := s.svc.AddEndpoint(method, handler, micro.WithEndpointSubject(subject))
	if err == nil {
		err = flush(s.ctx, s.nc) // from now on callers reach it
	}
	if err != nil {
		return fmt.Errorf("serve %s of agent %s: %w", method, s.host, err)
	}
	return nil
}

// answer runs fn and sends its reply, or empty if it has none, with its error.
func (s *Service) answer(r micro.Request, method string, empty proto.Message, fn func(context.Context) (proto.Message, error)) {
	ctx := s.ctx
	if ms, err := strconv.ParseInt(r.Headers().Get(timeoutHeader), 10, 64); err == nil && ms > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(ms)*time.Millisecond)
		defer cancel()
	}
	start := time.Now()
	resp, err := s.guard(ctx, method, fn)
	if resp == nil {
		resp = empty
	}
	if err != nil {
		s.setError(resp, wire.ErrorOf(err))
	}
	out, merr := proto.Marshal(resp)
	out, encoding := pack(out, s.nc.MaxPayload())
	if limit := s.nc.MaxPayload(); merr == nil && int64(len(out)) > limit {
		merr = fmt.Errorf("the reply has %d bytes, the bus allows %d", len(out), limit)
	}
	if merr != nil {
		s.log.Error("reply cannot be sent", "method", method, "error", merr)
		proto.Reset(resp)
		s.setError(resp, &wire.Error{Code: wire.Code_CODE_INTERNAL, Message: fmt.Sprintf("answer %s: %v", method, merr)})
		if out, merr = proto.Marshal(resp); merr != nil {
			return
		}
		encoding = ""
	}
	var opts []micro.RespondOpt
	if encoding != "" {
		opts = append(opts, micro.WithHeaders(micro.Headers{encodingHeader: {encoding}}))
	}
	if rerr := r.Respond(out, opts...); rerr != nil {
		s.log.Warn("reply lost", "method", method, "error", rerr)
	}
	s.log.Debug("call answered", "method", method, "duration_ms", time.Since(start).Milliseconds(), "error", err)
}

func (s *Service) setError(reply proto.Message, e *wire.Error) {
	if e.Host == "" {
		e.Host = s.host
	}
	reply.ProtoReflect().Set(errorField(reply), protoreflect.ValueOfMessage(e.ProtoReflect()))
}

// guard runs fn and turns a panic into an error.
func (s *Service) guard(ctx context.Context, method string, fn func(context.Context) (proto.Message, error)) (resp proto.Message, err error) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("handler panicked", "method", method, "panic", p, "stack", string(debug.Stack()))
			resp, err = nil, wire.Errorf(wire.Code_CODE_INTERNAL, "the agent's handler of %s broke: %v", method, p)
		}
	}()
	return fn(ctx)
}

func newOf[M proto.Message]() M {
	var zero M
	return zero.ProtoReflect().Type().New().Interface().(M)
}

// errorField is the field that holds the wire.Error of a reply, nil if there is none.
func errorField(m proto.Message) protoreflect.FieldDescriptor {
	f := m.ProtoReflect().Descriptor().Fields().ByName("error")
	if f == nil || f.Message() == nil || f.Message().FullName() != (&wire.Error{}).ProtoReflect().Descriptor().FullName() {
		return nil
	}
	return f
}

// Call asks an agent and returns its reply:
//
//	reply, err := transport.Call[*wire.PsRequest, *wire.PsReply](ctx, nc, "alpha", "ps", &wire.PsRequest{})
//
// Without a deadline in ctx it waits 10 s. An error of the agent comes as
// *wire.Failure together with the reply. Failures of the way there have
// CODE_UNAVAILABLE and wrap ErrNoAgent, ErrNoAnswer or ErrDisconnected; after
// ErrNoAnswer nobody knows whether the agent did what was asked. While this
// side is cut off, the request waits for the bus to come back.
func Call[Req, Resp proto.Message](ctx context.Context, nc *nats.Conn, host, method string, req Req) (Resp, error) {
	var none Resp
	if err := CheckName(host); err != nil {
		return none, wire.Errorf(wire.Code_CODE_INVALID, "call an agent: host: %w", err)
	}
	if err := CheckName(method); err != nil {
		return none, wire.Errorf(wire.Code_CODE_INVALID, "call agent %s: method: %w", host, err)
	}
	body, err := proto.Marshal(req)
	if err != nil {
		return none, wire.Errorf(wire.Code_CODE_INTERNAL, "call %s of agent %s: %w", method, host, err)
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callTimeout)
		defer cancel()
	}
	start := time.Now()
	msg, err := request(ctx, nc, agentSubject(host, method), body)
	if err != nil {
		switch {
		case errors.Is(err, nats.ErrNoResponders):
			err = &wire.Failure{Code: wire.Code_CODE_UNAVAILABLE, Cause: ErrNoAgent,
				Message: fmt.Sprintf("agent %s does not answer: is it running and connected to the bus?", host)}
		case errors.Is(err, ErrDisconnected):
			err = wire.Errorf(wire.Code_CODE_UNAVAILABLE, "call %s of agent %s: %w", method, host, err)
		case errors.Is(err, context.DeadlineExceeded), errors.Is(err, nats.ErrTimeout):
			err = wire.Errorf(wire.Code_CODE_UNAVAILABLE, "agent %s gave %w to %s (waited %s): it may be busy or its host stalled",
				host, ErrNoAnswer, method, time.Since(start).Round(time.Millisecond))
		case errors.Is(err, context.Canceled):
			err = fmt.Errorf("call %s of agent %s: %w", method, host, err)
		case errors.Is(err, nats.ErrMaxPayload):
			err = wire.Errorf(wire.Code_CODE_INVALID, "call %s of agent %s: the request has %d bytes, the bus allows %d", method, host, len(body), nc.MaxPayload())
		default:
			err = wire.Errorf(wire.Code_CODE_UNAVAILABLE, "call %s of agent %s: %w", method, host, err)
		}
		return none, err
	}
	resp := newOf[Resp]()
	data, err := unpack(msg.Data, msg.Header.Get(encodingHeader))
	if err == nil {
		err = proto.Unmarshal(data, resp)
	}
	if err != nil {
		return none, wire.Errorf(wire.Code_CODE_INTERNAL, "call %s of agent %s: read the reply: %w", method, host, err)
	}
	if f := errorField(resp); f != nil && resp.ProtoReflect().Has(f) {
		e := proto.CloneOf(resp.ProtoReflect().Get(f).Message().Interface().(*wire.Error))
		if e.Host == "" {
			e.Host = host
		}
		return resp, e.Err()
	}
	return resp, nil
}

// request is one request/reply. A request that could not even be sent, because
// the connection is down at this moment, is tried again until ctx ends.
func request(ctx context.Context, nc *nats.Conn, subject string, body []byte) (*nats.Msg, error) {
	for {
		msg := nats.NewMsg(subject)
		var encoding string
		if msg.Data, encoding = pack(body, nc.MaxPayload()); encoding != "" {
			msg.Header.Set(encodingHeader, encoding)
		}
		if deadline, ok := ctx.Deadline(); ok {
			msg.Header.Set(timeoutHeader, strconv.FormatInt(max(time.Until(deadline).Milliseconds(), 1), 10))
		}
		reply, err := nc.RequestMsgWithContext(ctx, msg)
		if !errors.Is(err, nats.ErrReconnectBufExceeded) {
			if err != nil && ctx.Err() != nil && !nc.IsConnected() {
				err = fmt.Errorf("%w: %w", ErrDisconnected, ctx.Err())
			}
			return reply, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", ErrDisconnected, ctx.Err())
		case <-time.After(25 * time.Millisecond):
		}
	}
}

// Discover lists the agents on the bus, sorted by host. It asks all of them at
// once and stops listening 250 ms after the last answer, then asks each for its
// current figures; an agent that does not give them in time is listed with
// what it said when it registered. No agent at all is an empty list. Two
// entries with one host are two agents that must not be.
func Discover(ctx context.Context, nc *nats.Conn) ([]*wire.AgentInfo, error) {
	found, err := services(ctx, nc)
	if err != nil {
		return nil, fmt.Errorf("look for agents: %w", err)
	}
	out := make([]*wire.AgentInfo, len(found))
	hosts := map[string]int{}
	for i, f := range found {
		info := &wire.AgentInfo{}
		if err := protojson.Unmarshal([]byte(f.Metadata["info"]), info); err != nil {
			info = &wire.AgentInfo{}
		}
		info.Host, info.Version = f.Metadata["host"], f.Metadata["version"]
		if p, err := strconv.ParseUint(f.Metadata["protocol"], 10, 32); err == nil {
			info.Protocol = uint32(p)
		}
		out[i] = info
		hosts[info.Host]++
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var wg sync.WaitGroup
	slots := make(chan struct{}, 32)
	for i, info := range out {
		if hosts[info.Host] > 1 {
			continue // an answer could be either's
		}
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			reply, err := Call[*wire.InfoRequest, *wire.InfoReply](ctx, nc, info.Host, methodInfo, &wire.InfoRequest{})
			if err == nil && reply.Info.GetHost() == info.Host {
				out[i] = reply.Info
			}
		})
	}
	wg.Wait()
	slices.SortStableFunc(out, func(a, b *wire.AgentInfo) int { return strings.Compare(a.Host, b.Host) })
	return out, nil
}

// services asks for the micro services of all agents.
func services(ctx context.Context, nc *nats.Conn) ([]micro.Info, error) {
	inbox := nc.NewInbox()
	sub, err := nc.SubscribeSync(inbox)
	if err != nil {
		return nil, err
	}
	defer func() { _ = sub.Unsubscribe() }()
	for {
		err = nc.PublishRequest("$SRV.INFO."+serviceName, inbox, nil)
		if !errors.Is(err, nats.ErrReconnectBufExceeded) {
			break
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", ErrDisconnected, ctx.Err())
		case <-time.After(25 * time.Millisecond):
		}
	}
	if err != nil {
		return nil, err
	}
	var found []micro.Info
	for {
		quiet, cancel := context.WithTimeout(ctx, discoverQuiet)
		msg, err := sub.NextMsgWithContext(quiet)
		cancel()
		if err != nil {
			switch {
			case errors.Is(err, nats.ErrNoResponders):
				return nil, nil
			case ctx.Err() != nil:
				return nil, ctx.Err()
			case errors.Is(err, context.DeadlineExceeded):
				return found, nil
			}
			return nil, err
		}
		var info micro.Info
		if err := json.Unmarshal(msg.Data, &info); err != nil || info.Metadata["host"] == "" {
			continue // not one of ours
		}
		found = append(found, info)
	}
}
