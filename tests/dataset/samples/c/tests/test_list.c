#include <assert.h>
#include <list.h>

int main(void)
{
    struct list list = {0};
    assert(list_push(&list, 7) == 0);
    list_free(&list);
    return 0;
}
