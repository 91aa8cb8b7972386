package org.example;

import org.example.money.*;

class AccountTest {
    void balanceIsTheSumOfBookings() {
        Account account = new Account(new Amount(10));
        account.book(new Amount(20));
        assert account.balance() == 30;
    }
}
