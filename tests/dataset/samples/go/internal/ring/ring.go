// Package ring keeps the last values.
package ring

import "errors"

// ErrFull tells that no place is left.
var ErrFull = errors.New("ring: full")

// Buffer holds at most a fixed number of values.
type Buffer struct {
	values []int
	limit  int
}

// New makes an empty buffer.
func New(limit int) *Buffer {
	return &Buffer{values: make([]int, 0, limit), limit: limit}
}

// Push adds a value.
func (b *Buffer) Push(value int) error {
	if len(b.values) >= b.limit {
		return ErrFull
	}
	b.values = append(b.values, value)
	return nil
}
