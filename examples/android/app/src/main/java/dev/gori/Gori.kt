// gori's C interface for Kotlin: one exported artifact, answered utterances. It knows nothing about Android.
package dev.gori

import java.io.Closeable
import java.io.File
import java.util.concurrent.locks.ReentrantReadWriteLock
import kotlin.concurrent.read
import kotlin.concurrent.write

/** What libgori refused, with its status (gori_status of gori.h) and its sentence. */
class GoriException(val status: Int, said: ByteArray) : Exception(said.decodeToString())

/** The functions of gori_jni.cpp. Texts are UTF-8. */
internal object Native {
    init {
        System.loadLibrary("gori_jni")
    }

    external fun open(directory: ByteArray, threads: Int): Long

    external fun call(handle: Long, said: ByteArray, form: Int): ByteArray

    external fun cancel(handle: Long)

    external fun close(handle: Long)
}

/** The form of an answer: gori_form of gori.h. */
enum class Form { CALLS, GLEO, TEXT }

/**
 * An open artifact: a directory with model.pte and runner.bin, mapped, not copied.
 *
 * May be used by several threads; answers are made one at a time. The first one opened in a process decides on `threads`.
 */
class Gori(directory: File, threads: Int = 1) : Closeable {
    // calls and cancels hold it for reading, so that close waits for them and none meets a freed handle
    private val inUse = ReentrantReadWriteLock()
    private var handle: Long = Native.open(directory.path.encodeToByteArray(), threads)

    /** The calls that answer `said`, as JSON. Blocks for the length of an answer: not for the main thread. */
    fun call(said: String, form: Form = Form.CALLS): String {
        require('\u0000' !in said) { "an utterance has no zero character" }
        return inUse.read { Native.call(opened(), said.encodeToByteArray(), form.ordinal).decodeToString() }
    }

    /** Ends the answer that is being made, from any thread: its `call` throws a GoriException of status 7. */
    fun cancel() {
        inUse.read { if (handle != 0L) Native.cancel(handle) }
    }

    /** Cancels, waits for the end of what runs, and frees. Again: nothing. */
    override fun close() {
        cancel()
        inUse.write {
            if (handle != 0L) Native.close(handle)
            handle = 0L
        }
    }

    private fun opened(): Long = handle.also { check(it != 0L) { "this artifact was closed" } }
}
