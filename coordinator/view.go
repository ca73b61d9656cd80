package coordinator

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"godwit/wire"
)

// view shows migrations while they go on. Its methods are called from one
// goroutine.
type view interface {
	// record shows a record that is new or has changed.
	record(r *wire.Record)
	// progress shows how far a transfer is.
	progress(p *wire.Progress)
	// note shows a sentence about a migration.
	note(id, text string)
	// close takes away what is only there for the moment.
	close()
}

// quiet is the view of who only wants to know the end.
type quiet struct{}

func (quiet) record(*wire.Record)     {}
func (quiet) progress(*wire.Progress) {}
func (quiet) note(string, string)     {}
func (quiet) close()                  {}

// plainEvery is how often a view that cannot redraw tells progress.
const plainEvery = 2 * time.Second

// textView is the view for people. On a terminal each migration that goes on
// has one line at the bottom that is drawn again and again; elsewhere there are
// only lines.
type textView struct {
	w     io.Writer
	width int // of the terminal; 0: none
	many  bool
	now   func() time.Time
	start time.Time

	items []*item
	drawn int // lines at the bottom
	last  time.Time
}

type item struct {
	rec   *wire.Record
	prog  map[string]*wire.Progress // by host
	steps int                       // of rec, that were shown
	plain time.Time                 // last plain line
}

func newTextView(w io.Writer, many bool) *textView {
	return &textView{w: w, width: terminalWidth(w), many: many, now: time.Now, start: time.Now()}
}

func (v *textView) find(id string) *item {
	for _, it := range v.items {
		if it.rec.Id == id {
			return it
		}
	}
	return nil
}

// say prints lines that stay, above those that do not.
func (v *textView) say(id, text string) {
	v.erase()
	name := ""
	if v.many && id != "" {
		name = id + "  "
	}
	_, _ = fmt.Fprintf(v.w, "%9s  %s%s\n", "+"+elapsed(v.now().Sub(v.start)), name, text)
}

// elapsed is a time of the margin: "0.123 s", "123 s".
func elapsed(d time.Duration) string {
	if d < 100*time.Second {
		return fmt.Sprintf("%.3f s", d.Seconds())
	}
	return fmt.Sprintf("%.0f s", d.Seconds())
}

func (v *textView) record(r *wire.Record) {
	it := v.find(r.Id)
	if it == nil {
		it = &item{prog: map[string]*wire.Progress{}}
		v.items = append(v.items, it)
		it.rec = r
		if v.many {
			v.say(r.Id, subject(r)+", "+route(r))
			// Only where it is now matters of what was before.
			it.steps = max(len(r.Steps)-1, 0)
		}
	}
	it.rec = r
	for ; it.steps < len(r.Steps); it.steps++ {
		s := r.Steps[it.steps]
		text := s.State.Word()
		if s.By != "" && s.By != coordinatorName {
			text += " (" + s.By + ")"
		}
		if s.State == wire.State_STATE_ABORTING && r.Reason != "" {
			text += ": " + r.Reason
		}
		if s.State == wire.State_STATE_HANDING_OFF {
			text += ": committed, the tree now belongs to " + r.Destination
		}
		if s.State == wire.State_STATE_PAGING {
			text += ": the tree runs, and waits for memory that is still at " + r.Source + ": both hosts are needed"
		}
		if homes := proxyHomes(r); s.State == wire.State_STATE_COMPLETED && homes != "" {
			text += "; still needed for bytes that flow to and from the tree: " + homes
		}
		v.say(r.Id, text)
	}
	v.draw(true)
}

// proxyHomes are the hosts of objects that are proxied, with how many each has.
func proxyHomes(r *wire.Record) string {
	var homes []string
	count := map[string]int{}
	for _, p := range r.Options.GetProxied() {
		if count[p.Home]++; count[p.Home] == 1 {
			homes = append(homes, p.Home)
		}
	}
	for i, h := range homes {
		homes[i] = fmt.Sprintf("%s (%s)", h, plural(count[h], "object"))
	}
	return strings.Join(homes, ", ")
}

func (v *textView) note(id, text string) {
	v.say(id, text)
	v.draw(true)
}

func (v *textView) progress(p *wire.Progress) {
	it := v.find(p.Id)
	if it == nil || over(it.rec) {
		return
	}
	it.prog[p.Host] = p
	if v.width > 0 {
		v.draw(false)
		return
	}
	now := v.now()
	if it.plain.IsZero() {
		it.plain = now // what takes less time needs no such line
	}
	if now.Sub(it.plain) >= plainEvery && p.Host == it.rec.Source && p.BytesDone > 0 {
		it.plain = now
		v.say(p.Id, progressText(it.rec, it.latest()))
	}
}

// latest is the progress to show: the source's, which knows what is ahead.
func (it *item) latest() *wire.Progress {
	if p := it.prog[it.rec.Source]; p != nil {
		return p
	}
	return it.prog[it.rec.Destination]
}

// redrawEvery bounds how often a terminal is drawn on.
const redrawEvery = 50 * time.Millisecond

func (v *textView) draw(must bool) {
	now := v.now()
	if v.width == 0 || !must && now.Sub(v.last) < redrawEvery {
		return
	}
	v.last = now
	v.erase()
	var b strings.Builder
	for _, it := range v.items {
		if over(it.rec) {
			continue
		}
		line := bar(it.rec, it.latest(), v.width-1, v.many)
		b.WriteString(line + "\n")
		v.drawn++
	}
	_, _ = io.WriteString(v.w, b.String())
}

// erase takes the lines at the bottom away.
func (v *textView) erase() {
	if v.drawn > 0 {
		_, _ = fmt.Fprintf(v.w, "\x1b[%dA\r\x1b[J", v.drawn)
		v.drawn = 0
	}
}

func (v *textView) close() { v.erase() }

// bar is one line of at most width columns: phase, bar, bytes, rate, time left.
func bar(r *wire.Record, p *wire.Progress, width int, name bool) string {
	head := fmt.Sprintf("%-13s", r.State.Word())
	if name {
		head = r.Id + "  " + head
	}
	tail := ""
	if p != nil && p.BytesDone > 0 {
		tail = "  " + progressText(r, p)
	}
	room := width - utf8.RuneCountInString(head) - utf8.RuneCountInString(tail) - 8
	line := head
	if p != nil && p.BytesTotal > 0 && room >= 10 {
		room = min(room, 40)
		part := min(float64(p.BytesDone)/float64(p.BytesTotal), 1)
		full := int(part * float64(room))
		line += fmt.Sprintf(" %s%s %3.0f %%", strings.Repeat("█", full), strings.Repeat("░", room-full), part*100)
	}
	line += tail
	if runes := []rune(line); len(runes) > width {
		line = string(runes[:max(width, 0)])
	}
	return line
}

// progressText says bytes, rate and time left.
func progressText(r *wire.Record, p *wire.Progress) string {
	s := formatBytes(p.BytesDone)
	if p.BytesTotal > p.BytesDone {
		s += " of " + formatBytes(p.BytesTotal)
	}
	if p.BytesPerSecond > 0 {
		s += ", " + formatRate(p.BytesPerSecond)
		// A rate that comes from the first few bytes foretells nothing.
		if p.BytesTotal > p.BytesDone && p.BytesDone >= p.BytesTotal/100 && !wire.Committed(r.State) {
			left := time.Duration(float64(p.BytesTotal-p.BytesDone) / float64(p.BytesPerSecond) * float64(time.Second))
			s += ", " + formatDuration(left.Round(10*time.Millisecond)) + " left"
		}
	}
	if p.Message != "" {
		s += ", " + printable(p.Message)
	}
	return s
}

// jsonView writes one JSON document a line:
//
//	{"event":"state", "migration":{…}}
//	{"event":"progress", "progress":{…}}
//	{"event":"note", "id":…, "text":…}
type jsonView struct{ w io.Writer }

type eventDoc struct {
	Event     string        `json:"event"`
	Time      time.Time     `json:"time"`
	ID        string        `json:"id"`
	Migration *migrationDoc `json:"migration,omitempty"`
	Progress  *progressDoc  `json:"progress,omitempty"`
	Text      string        `json:"text,omitempty"`
}

type progressDoc struct {
	Host           string `json:"host"`
	State          string `json:"state"`
	BytesDone      uint64 `json:"bytes_done"`
	BytesTotal     uint64 `json:"bytes_total"`
	PagesDone      uint64 `json:"pages_done"`
	BytesPerSecond uint64 `json:"bytes_per_second"`
	Message        string `json:"message,omitempty"`
}

func (v jsonView) record(r *wire.Record) {
	_ = writeJSON(v.w, eventDoc{Event: "state", Time: time.Now().UTC(), ID: r.Id, Migration: newMigrationDoc(r, 0)})
}

func (v jsonView) progress(p *wire.Progress) {
	_ = writeJSON(v.w, eventDoc{Event: "progress", Time: time.Now().UTC(), ID: p.Id, Progress: &progressDoc{
		Host: p.Host, State: p.State.Word(), BytesDone: p.BytesDone, BytesTotal: p.BytesTotal, PagesDone: p.PagesDone,
		BytesPerSecond: p.BytesPerSecond, Message: p.Message,
	}})
}

func (v jsonView) note(id, text string) {
	_ = writeJSON(v.w, eventDoc{Event: "note", Time: time.Now().UTC(), ID: id, Text: text})
}

func (jsonView) close() {}
