package org.example;

import java.util.ArrayList;
import java.util.List;
import org.example.money.Amount;
import static org.example.money.Rounding.half;

/** An account with its bookings. */
public class Account {
    private final List<Amount> bookings = new ArrayList<>();

    public Account(Amount first) {
        bookings.add(first);
    }

    public void book(Amount amount) {
        if (amount == null) {
            throw new IllegalArgumentException("amount");
        } else {
            bookings.add(amount);
        }
    }

    public long balance() {
        long cents = 0;
        for (Amount amount : bookings) {
            cents += half(amount.cents());
        }
        return cents;
    }
}
