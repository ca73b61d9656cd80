package ns

import (
	"testing"

	ipc_msg "github.com/checkpoint-restore/go-criu/v8/crit/images/ipc-msg"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
)

// FuzzQueues: no image of message queues makes the parser panic, and what it
// accepts holds as many messages as it says.
func FuzzQueues(f *testing.F) {
	d := desc(1, 2, 0, 0, 0, 0, 0o600)
	var extra []byte
	extra, _ = image.AppendMessage(extra, &ipc_msg.IpcMsg{Mtype: proto.Uint64(5), Msize: proto.Uint32(3)})
	extra = append(extra, "abc\x00\x00\x00\x00\x00"...)
	extra, _ = image.AppendMessage(extra, &ipc_msg.IpcMsgEntry{Desc: d, Qbytes: proto.Uint32(16384), Qnum: proto.Uint32(0)})
	f.Add(uint32(1), extra)
	f.Add(uint32(0), []byte{})
	f.Fuzz(func(t *testing.T, n uint32, b []byte) {
		qs, err := parseQueues(&ipc_msg.IpcMsgEntry{Desc: d, Qbytes: proto.Uint32(16384), Qnum: &n}, b)
		if err != nil {
			return
		}
		for _, q := range qs {
			if len(q.messages) != int(q.entry.GetQnum()) {
				t.Errorf("%d messages of %d", len(q.messages), q.entry.GetQnum())
			}
		}
	})
}
