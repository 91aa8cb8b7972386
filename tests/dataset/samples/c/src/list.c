#include "list.h"
#include "grow.h"

#include <stdlib.h>

int list_push(struct list *list, int value)
{
    if (list->length == list->room) {
        size_t room = grow(list->room);
        int *values = realloc(list->values, room * sizeof *values);
        if (values == NULL) {
            return -1;
        }
        list->values = values;
        list->room = room;
    }
    list->values[list->length++] = value;
    return 0;
}

void list_free(struct list *list)
{
    free(list->values);
    list->values = NULL;
    list->length = list->room = 0;
}
