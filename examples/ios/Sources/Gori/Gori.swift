// gori's C interface for Swift: one exported artifact, answered utterances. It knows nothing about views.
import CGori
import Foundation

/// What libgori refused, with its status and its sentence.
public struct GoriError: Error, CustomStringConvertible {
    public let status: UInt32
    public let description: String

    init(_ status: gori_status) {
        // of this thread's last call: taken before another one is made
        self.status = status.rawValue
        description = String(cString: gori_error())
    }
}

/// The form of an answer: gori_form of gori.h.
public enum Form: Int32 {
    case calls = 0
    case gleo = 1
    case text = 2
}

/// An answer, and what it cost.
public struct Answer {
    public let json: String
    public let firstTokenMs: Double
    public let totalMs: Double
}

/// An open artifact: a directory with model.pte and runner.bin, mapped, not copied.
///
/// Answers are made one at a time on a queue of their own. Cancelling the task that waits ends the answer that is being
/// made; one that has not begun is made.
public final class Gori: @unchecked Sendable {
    private let handle: OpaquePointer
    private let queue = DispatchQueue(label: "gori", qos: .userInitiated)

    /// Opens `directory`. The first one of a process decides on `threads`.
    public init(directory: URL, threads: Int32 = 1) throws {
        var options = gori_open_options(size: MemoryLayout<gori_open_options>.size, threads: threads, use_prefix: 1, lookup: 0)
        var opened: OpaquePointer?
        let status = gori_open(directory.path, &options, &opened)
        guard status == GORI_OK, let opened else { throw GoriError(status) }
        handle = opened
    }

    deinit {
        // an answer that is being made holds self, so none is
        gori_close(handle)
    }

    /// The calls that answer `said`, as JSON.
    public func call(_ said: String, form: Form = .calls) async throws -> Answer {
        try await withTaskCancellationHandler {
            try Task.checkCancellation()
            return try await withCheckedThrowingContinuation { waiting in
                queue.async { waiting.resume(with: Result { try self.answer(said, form) }) }
            }
        } onCancel: {
            gori_cancel(handle)
        }
    }

    private func answer(_ said: String, _ form: Form) throws -> Answer {
        var buffer = [CChar](repeating: 0, count: 1 << 14)
        var result = gori_result()
        var status = attempt(said, form, &buffer, &result)
        if status == GORI_ERROR_CAPACITY {
            buffer = [CChar](repeating: 0, count: result.length + 1)
            status = attempt(said, form, &buffer, &result)
        }
        guard status == GORI_OK else { throw GoriError(status) }
        return Answer(json: String(cString: buffer), firstTokenMs: result.first_token_ms, totalMs: result.total_ms)
    }

    private func attempt(
        _ said: String, _ form: Form, _ buffer: inout [CChar], _ result: inout gori_result
    ) -> gori_status {
        var options = gori_call_options()
        options.size = MemoryLayout<gori_call_options>.size
        options.form = form.rawValue
        options.top_p = 1
        let capacity = buffer.count
        return buffer.withUnsafeMutableBufferPointer { text in
            result.size = MemoryLayout<gori_result>.size
            result.text = text.baseAddress
            result.capacity = capacity
            return gori_call(handle, said, &options, &result)
        }
    }
}
