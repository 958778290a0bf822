// swift-tools-version:5.9
// The Swift package: Gori over CGori.xcframework, which build.sh makes.
import PackageDescription

let package = Package(
    name: "Gori",
    platforms: [.iOS(.v17)],
    products: [.library(name: "Gori", targets: ["Gori"])],
    targets: [
        .binaryTarget(name: "CGori", path: "CGori.xcframework"),
        .target(name: "Gori", dependencies: ["CGori"]),
    ]
)
