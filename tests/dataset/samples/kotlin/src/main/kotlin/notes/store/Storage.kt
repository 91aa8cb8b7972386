package notes.store

class Store {
    private val notes = mutableMapOf<Int, String>()
    val size get() = notes.size

    fun put(id: Int, text: String) {
        require(text.isNotBlank()) { "a note has text" }
        notes[id] = text
    }
}

fun newId(): Int = java.util.UUID.randomUUID().hashCode()
