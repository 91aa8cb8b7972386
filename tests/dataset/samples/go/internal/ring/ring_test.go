package ring

import "testing"

func TestPushFailsWhenFull(t *testing.T) {
	buffer := New(1)
	_ = buffer.Push(1)
	if err := buffer.Push(2); err != ErrFull {
		t.Fatalf("got %v", err)
	}
}
