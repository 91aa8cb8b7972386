package org.example.money;

public record Amount(long cents) {
    public Amount plus(Amount other) {
        return new Amount(cents + other.cents);
    }
}
