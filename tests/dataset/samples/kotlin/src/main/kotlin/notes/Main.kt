package notes

import notes.store.Store
import notes.store.newId

fun main() {
    val store = Store()
    store.put(newId(), "hello")
    println(store.size)
}
