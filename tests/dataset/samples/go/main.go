package main

import (
	"fmt"

	"example.org/queue/internal/ring"
)

func main() {
	buffer := ring.New(4)
	for i := 0; i < 6; i++ {
		if err := buffer.Push(i); err != nil {
			fmt.Println("full:", err)
			break
		}
	}
}
