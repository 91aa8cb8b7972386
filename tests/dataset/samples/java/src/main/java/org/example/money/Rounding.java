package org.example.money;

public final class Rounding {
    private Rounding() {
    }

    public static long half(long cents) {
        long rest = cents % 10;
        return rest >= 5 ? cents - rest + 10 : cents - rest;
    }
}
