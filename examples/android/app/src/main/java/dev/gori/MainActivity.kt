// One screen: an utterance in, the calls that answer it and how long that took. Everything slow is on one other thread.
package dev.gori

import android.app.Activity
import android.os.Bundle
import android.os.Process
import android.os.SystemClock
import android.view.inputmethod.EditorInfo
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.TextView
import java.util.concurrent.Executors
import java.util.concurrent.atomic.AtomicReference

class MainActivity : Activity() {
    private val worker = Executors.newSingleThreadExecutor { task ->
        Thread({
            Process.setThreadPriority(Process.THREAD_PRIORITY_FOREGROUND)
            task.run()
        }, "gori")
    }
    private val gori = AtomicReference<Gori?>()

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        val answer = TextView(this).apply { setTextIsSelectable(true) }
        val said = EditText(this).apply {
            hint = "운전석 열선 2단계"
            setSingleLine()
            imeOptions = EditorInfo.IME_ACTION_GO
            setOnEditorActionListener { view, _, _ ->
                answer(view.text.toString(), answer)
                true
            }
        }
        setContentView(
            LinearLayout(this).apply {
                orientation = LinearLayout.VERTICAL
                addView(said)
                addView(answer)
            },
        )
        run(answer) {
            gori.set(Gori(installed(this, "car")))
            gori.get()?.call("안녕") // the first answer allocates: not the driver's
            "ready"
        }
    }

    private fun answer(said: String, into: TextView) {
        gori.get()?.cancel() // who speaks again no longer waits for the old answer
        run(into) {
            val began = SystemClock.elapsedRealtimeNanos()
            val calls = gori.get()?.call(said, Form.GLEO) ?: throw IllegalStateException("the artifact did not open")
            "$calls\n${(SystemClock.elapsedRealtimeNanos() - began) / 1_000_000.0} ms"
        }
    }

    private fun run(into: TextView, work: () -> String) = worker.execute {
        val text = try {
            work()
        } catch (failure: Exception) {
            failure.message ?: failure.toString()
        }
        runOnUiThread { into.text = text }
    }

    override fun onDestroy() {
        gori.get()?.cancel()
        worker.execute { gori.getAndSet(null)?.close() }
        worker.shutdown()
        super.onDestroy()
    }
}
