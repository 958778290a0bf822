// One screen: an utterance in, the calls that answer it and how long that took. The artifact is the folder `car` in the app's
// bundle, which is read-only and signed with the app: it is mapped where it lies.
import Gori
import SwiftUI

@main
struct ExampleApp: App {
    var body: some Scene {
        WindowGroup { AskView() }
    }
}

@MainActor
final class Assistant: ObservableObject {
    @Published private(set) var answer = ""
    private var gori: Gori?
    private var asking: Task<Void, Never>?

    func open() async {
        do {
            guard let car = Bundle.main.url(forResource: "car", withExtension: nil) else {
                answer = "the app has no folder car: add the artifact as a folder reference"
                return
            }
            let opened = try Gori(directory: car)
            _ = try await opened.call("안녕")  // the first answer allocates: not the driver's
            gori = opened
            answer = "ready"
        } catch {
            answer = "\(error)"
        }
    }

    func ask(_ said: String) {
        asking?.cancel()  // who speaks again no longer waits for the old answer
        guard let gori else { return }
        asking = Task {
            do {
                let found = try await gori.call(said, form: .gleo)
                if !Task.isCancelled { answer = "\(found.json)\n\(found.totalMs) ms" }
            } catch {
                if !Task.isCancelled { answer = "\(error)" }
            }
        }
    }
}

struct AskView: View {
    @StateObject private var assistant = Assistant()
    @State private var said = ""

    var body: some View {
        VStack(alignment: .leading) {
            TextField("운전석 열선 2단계", text: $said)
                .textFieldStyle(.roundedBorder)
                .onSubmit { assistant.ask(said) }
            Text(assistant.answer)
                .font(.system(.body, design: .monospaced))
                .textSelection(.enabled)
        }
        .padding()
        .task { await assistant.open() }
    }
}
