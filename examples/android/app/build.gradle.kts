plugins {
    id("com.android.application")
    id("org.jetbrains.kotlin.android")
}

android {
    namespace = "dev.gori"
    compileSdk = 34
    // r28c, which ExecuTorch's own builds use; its libraries have 16 KiB pages, as Android 15 devices may
    ndkVersion = "28.2.13676358"

    defaultConfig {
        applicationId = "dev.gori.example"
        minSdk = 26
        targetSdk = 34
        versionCode = 1
        versionName = "1.0"
        ndk {
            abiFilters += listOf("arm64-v8a", "x86_64")
        }
        externalNativeBuild {
            cmake {
                val prefix = rootProject.file(providers.gradleProperty("executorch.prefix").get())
                arguments += listOf("-DEXECUTORCH_PREFIX=$prefix", "-DANDROID_STL=c++_static", "-DCMAKE_BUILD_TYPE=Release")
            }
        }
    }

    externalNativeBuild {
        cmake {
            path = file("src/main/cpp/CMakeLists.txt")
            version = "3.24.0+"
        }
    }

    // the artifact of `gori export --target executorch`, copied to src/main/assets/car
    androidResources {
        noCompress += listOf("pte", "bin")
    }

    buildTypes {
        release {
            isMinifyEnabled = true
            proguardFiles("proguard-rules.pro")
        }
    }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_11
        targetCompatibility = JavaVersion.VERSION_11
    }
    kotlinOptions {
        jvmTarget = "11"
    }
}
