// From the APK's assets to a directory that can be mapped: each file checked against the manifest, all or nothing.
package dev.gori

import android.content.Context
import java.io.File
import java.io.IOException
import java.security.MessageDigest
import org.json.JSONObject

/** The artifact under assets/`name`, in a directory of this app; copied there when it is not yet. */
fun installed(context: Context, name: String): File {
    val manifest = context.assets.open("$name/manifest.json").use { it.readBytes() }
    // a directory for each content: an update never writes into what is mapped
    val target = File(context.filesDir, "gori/$name-${hex(manifest).take(16)}")
    if (!target.exists()) {
        val parts = File(target.path + ".part")
        parts.deleteRecursively()
        parts.mkdirs()
        copy(context, name, manifest, parts)
        if (!parts.renameTo(target)) throw IOException("cannot move ${parts.path} to ${target.path}")
    }
    target.parentFile?.listFiles { file -> file.name.startsWith("$name-") && file != target }
        ?.forEach { it.deleteRecursively() }
    return target
}

private fun copy(context: Context, name: String, manifest: ByteArray, parts: File) {
    val files = JSONObject(manifest.decodeToString()).getJSONObject("files")
    for (file in files.keys()) {
        // what is not read on the device stays in the APK: golden outputs, the bill of materials, the model card
        if (file !in NEEDED && file != PREFIX) continue
        val bytes = context.assets.open("$name/$file").use { it.readBytes() }
        val wanted = files.getJSONObject(file).getString("sha256")
        if (hex(bytes) != wanted) throw IOException("$file of $name is not what its manifest says")
        File(parts, file).outputStream().use {
            it.write(bytes)
            it.fd.sync()
        }
    }
    for (file in NEEDED) {
        if (!File(parts, file).exists()) throw IOException("$name has no $file: export it for executorch")
    }
}

private val NEEDED = listOf("model.pte", "runner.bin")
private const val PREFIX = "prefix.bin"

private fun hex(bytes: ByteArray): String =
    MessageDigest.getInstance("SHA-256").digest(bytes).joinToString("") { "%02x".format(it) }
