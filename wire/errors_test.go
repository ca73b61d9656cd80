package wire

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
)

func TestErrors(t *testing.T) {
	refused := Errorf(Code_CODE_REFUSED, "dump of pid %d refused", 7)
	refused.Problems = []*Problem{
		{Object: &Object{Pid: 7, Comm: "x", Fd: 0, HasFd: true, Path: "/dev/kvm", Key: "file[1:2]"}, Reason: "cannot be carried", Hint: "close it"},
		{Reason: "no memory"},
	}
	const lines = "\n  - pid 7 (x) fd 0 /dev/kvm [key file[1:2]]: cannot be carried; close it\n  - no memory"
	tests := []struct {
		name string
		err  error
		want *Error
		text string // of the error rebuilt on the other side
		exit int
	}{
		{"nil", nil, nil, "", ExitDone},
		{"plain", errors.New("x"), &Error{Code: Code_CODE_INTERNAL, Message: "x"}, "x", ExitFailed},
		{"deadline", fmt.Errorf("wait: %w", context.DeadlineExceeded),
			&Error{Code: Code_CODE_UNAVAILABLE, Message: "wait: context deadline exceeded"}, "wait: context deadline exceeded", ExitFailed},
		{"failure", Errorf(Code_CODE_INVALID, "no pid"), &Error{Code: Code_CODE_INVALID, Message: "no pid"}, "no pid", ExitUsage},
		{"refusal", refused, &Error{Code: Code_CODE_REFUSED, Message: "dump of pid 7 refused", Problems: refused.Problems},
			"dump of pid 7 refused" + lines, ExitRefused},
		{"wrapped, with a place", fmt.Errorf("migrate: %w", refused.At("alpha", "FREEZING")),
			&Error{Code: Code_CODE_REFUSED, Message: "migrate: dump of pid 7 refused", Host: "alpha", Phase: "FREEZING", Problems: refused.Problems},
			"alpha: freezing: migrate: dump of pid 7 refused" + lines, ExitRefused},
		{"place is not replaced", Errorf(Code_CODE_ABORTED, "stop").At("alpha", "").At("beta", "FINAL_COPYING"),
			&Error{Code: Code_CODE_ABORTED, Message: "stop", Host: "alpha", Phase: "FINAL_COPYING"}, "alpha: final copying: stop", ExitAborted},
		{"state unknown", Errorf(Code_CODE_UNKNOWN_STATE, "look"), &Error{Code: Code_CODE_UNKNOWN_STATE, Message: "look"}, "look", ExitUnknownState},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			got := ErrorOf(tc.err)
			if diff := cmp.Diff(tc.want, got, protocmp.Transform()); diff != "" {
				t.Errorf("sent (-want +got):\n%s", diff)
			}
			back := got.Err()
			if (back == nil) != (tc.err == nil) {
				t.Fatalf("rebuilt %v", back)
			}
			if back != nil && back.Error() != tc.text {
				t.Errorf("rebuilt %q, want %q", back, tc.text)
			}
			// What was rebuilt travels on unchanged.
			if diff := cmp.Diff(got, ErrorOf(back), protocmp.Transform()); diff != "" {
				t.Errorf("sent on (-first +second):\n%s", diff)
			}
			if ExitCode(tc.err) != tc.exit || ExitCode(back) != tc.exit {
				t.Errorf("exit codes %d and %d, want %d", ExitCode(tc.err), ExitCode(back), tc.exit)
			}
		})
	}
	if err := Errorf(Code_CODE_INTERNAL, "open: %w", fs.ErrNotExist); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the cause is lost")
	}
	if CodeOf(nil) != Code_CODE_UNSPECIFIED {
		t.Error("nil has a code")
	}
	if text := (&Error{Code: Code_CODE_INTERNAL}).Err().Error(); text != "failed without saying why (CODE_INTERNAL)" {
		t.Errorf("empty message: %q", text)
	}
}
