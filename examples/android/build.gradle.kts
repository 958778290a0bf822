// The versions that ExecuTorch's own Android project has at 1.5.0.
plugins {
    id("com.android.application") version "8.9.0" apply false
    id("org.jetbrains.kotlin.android") version "1.9.23" apply false
}
