#include <stddef.h>

static inline size_t grow(size_t room)
{
    return room ? room * 2 : 8;
}
