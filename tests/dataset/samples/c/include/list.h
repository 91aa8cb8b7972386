#ifndef LIST_H
#define LIST_H

#include <stddef.h>

struct list {
    int *values;
    size_t length, room;
};

int list_push(struct list *list, int value);
void list_free(struct list *list);

#endif
